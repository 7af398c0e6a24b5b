"""Mini-batches and the sharing of rows over ranks."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.batches import balanced_partition, mini_batches

groups = st.lists(st.integers(0, 6), min_size=1, max_size=30).map(np.array)


@given(groups, st.integers(1, 8), st.integers(1, 3), st.booleans())
def test_every_epoch_takes_each_row_once_and_keeps_prompts_whole(group, size, epochs, shuffle):
    batches = mini_batches(group, size, epochs=epochs, shuffle=shuffle, seed=1, step=2)
    prompts = len(set(group.tolist()))
    per_epoch = -(-prompts // size)
    assert len(batches) == epochs * per_epoch
    for epoch in range(epochs):
        own = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert sorted(np.concatenate(own).tolist()) == list(range(len(group)))
        held = [set(group[rows].tolist()) for rows in own]
        assert [len(prompts_of_batch) for prompts_of_batch in held[:-1]] == [size] * (per_epoch - 1)
        assert all(not a & b for a, b in itertools.combinations(held, 2))


def test_without_shuffle_prompts_come_in_order_of_appearance():
    group = np.array([9, 9, 3, 3, 7, 7])
    assert [rows.tolist() for rows in mini_batches(group, 2, epochs=2)] == [[0, 1, 2, 3], [4, 5]] * 2
    assert [rows.tolist() for rows in mini_batches(group, 1)] == [[0, 1], [2, 3], [4, 5]]


def test_shuffled_mini_batches_are_a_pure_function_of_seed_step_and_epoch():
    group = np.repeat(np.arange(32), 2)

    def drawn(seed, step):
        np.random.random()  # global state has no part in it
        return [rows.tolist() for rows in mini_batches(group, 8, epochs=2, shuffle=True, seed=seed, step=step)]

    first = drawn(1, 1)
    assert drawn(1, 1) == first
    assert drawn(1, 2) != first
    assert drawn(2, 1) != first
    assert first[:4] != first[4:]


@pytest.mark.parametrize("seed", range(3))
def test_shuffle_gives_each_prompt_every_place_about_equally_often(seed):
    group = np.arange(4)
    first = [mini_batches(group, 1, shuffle=True, seed=seed, step=step)[0][0] for step in range(400)]
    assert np.bincount(first, minlength=4).min() > 60


lengths = st.lists(st.integers(1, 1000), max_size=60).map(lambda x: np.array(x, np.int64))


@given(lengths, st.integers(1, 8))
def test_a_partition_takes_each_row_once_in_equal_numbers(lengths, ranks):
    shares = balanced_partition(lengths, ranks)
    assert len(shares) == ranks
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(lengths)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1
    assert all((np.diff(share) > 0).all() for share in shares)


@given(lengths.filter(len), st.integers(1, 8))
def test_token_sums_of_ranks_differ_by_at_most_the_longest_row(lengths, ranks):
    sums = [lengths[share].sum() for share in balanced_partition(lengths, ranks)]
    assert max(sums) - min(sums) <= lengths.max()


@given(lengths, st.integers(1, 8))
def test_each_round_gives_its_longest_row_to_the_rank_with_the_fewest_tokens(lengths, ranks):
    shares: list[list[int]] = [[] for _ in range(ranks)]
    longest_first = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(lengths), ranks):
        lightest_first = sorted(range(ranks), key=lambda rank: sum(lengths[row] for row in shares[rank]))
        for rank, row in zip(lightest_first, longest_first[start : start + ranks], strict=False):
            shares[rank].append(row)
    assert [share.tolist() for share in balanced_partition(lengths, ranks)] == [sorted(share) for share in shares]


def test_a_large_batch_of_ragged_lengths_is_balanced_within_a_percent():
    lengths = np.random.default_rng(0).geometric(1 / 400, 1024).clip(1, 4096)
    sums = [lengths[share].sum() for share in balanced_partition(lengths, 8)]
    assert max(sums) / min(sums) < 1.01
