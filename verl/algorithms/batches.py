"""Chooses the rows of each optimizer step and each rank's share of them."""

from __future__ import annotations

import numpy as np


def mini_batches(
    group: np.ndarray, mini_batch_size: int, *, epochs: int = 1, shuffle: bool = False, seed: int = 0, step: int = 0
) -> list[np.ndarray]:
    """Row indices (int64, ascending) of each optimizer step of one PPO step, epoch after epoch.

    group: shape (B,): rows of one prompt share it. mini_batch_size: prompts; all rows of a prompt stay together.
    Prompts are taken in order of appearance, or, with shuffle, in an order that is a pure function of
    (seed, step, epoch). When mini_batch_size does not divide the prompts, an epoch's last mini-batch is smaller.
    """
    _, first_row, prompt_of_row = np.unique(group, return_index=True, return_inverse=True)
    in_order = np.argsort(first_row)
    batches = []
    for epoch in range(epochs):
        order = np.random.default_rng([seed, step, epoch]).permutation(in_order) if shuffle else in_order
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        batch_of_row = position[prompt_of_row] // mini_batch_size
        batches += [np.flatnonzero(batch_of_row == batch) for batch in range(-(-len(order) // mini_batch_size))]
    return batches


def balanced_partition(lengths: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Each rank's positions (int64, ascending): counts differ by at most one, token sums nearly equal.

    Greedy: rows are dealt from the longest, ``ranks`` at a time, each round's longest to the rank with the fewest
    tokens so far. Sums then differ by no more than the longest row. With fewer rows than ranks, some get none.
    """
    lengths = np.asarray(lengths)
    longest_first = np.argsort(-lengths, kind="stable")
    loads = np.zeros(ranks, np.int64)
    rank_of = np.empty(len(lengths), np.int64)
    for start in range(0, len(lengths), ranks):
        rows = longest_first[start : start + ranks]
        lightest_first = np.argsort(loads, kind="stable")[: len(rows)]
        rank_of[rows] = lightest_first
        loads[lightest_first] += lengths[rows]
    return np.split(np.argsort(rank_of, kind="stable"), np.cumsum(np.bincount(rank_of, minlength=ranks))[:-1])
