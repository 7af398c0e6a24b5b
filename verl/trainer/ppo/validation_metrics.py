"""Validation: per-prompt statistics of N sampled answers, averaged over a data source's prompts.

Names are ``val-core/{data_source}/{variable}/{statistic}@{k}`` for the numbers to look at first: mean@N, best@N and
maj@N of the core variable. The core variable is ``acc`` if the scorer returns it, otherwise ``reward`` (the score). All
other names start with ``val-aux/``. With N > 1, for k = 2, 4, 8, ... and N:

mean@N, std@N: of a prompt's N values (population std).
best@k, worst@k: expected maximum and minimum of k of the N values, exact over all subsets of k.
maj@k: value of the majority's answer among k of the N, by the scorer's extracted answer ``pred``.
"""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from math import comb

import numpy as np
import pyarrow as pa

MAX_SUBSETS = 1000  # maj@k uses all subsets of k up to this number, and samples this number if there are more


def validation_metrics(table: pa.Table, *, seed: int = 0) -> dict[str, float]:
    """Metrics by name.

    Reads the columns data_source, group (int64: one prompt), score and, if it exists, reward_extra (a JSON object whose
    numbers and truth values are variables, and whose ``pred`` is the answer that maj@k votes on).

    seed: for the subsets that maj@k samples.
    """
    metrics: dict[str, float] = {}
    for source, rows in _samples(table).items():
        core = "acc" if any("acc" in row["variables"] for row in rows) else "reward"
        names = dict.fromkeys(name for row in rows for name in row["variables"])  # in order of appearance
        for variable in names:
            by_prompt: dict[int, list[dict]] = defaultdict(list)
            for row in rows:
                if variable in row["variables"]:
                    by_prompt[row["group"]].append(row)
            largest = max(map(len, by_prompt.values()))
            for statistic, value in _variable_metrics(variable, by_prompt, largest, seed).items():
                kind, _, k = statistic.partition("@")
                is_core = variable == core and int(k) == largest and kind in ("mean", "best", "maj")
                metrics[f"{'val-core' if is_core else 'val-aux'}/{source}/{variable}/{statistic}"] = value
    return metrics


def best_and_worst_of(values: np.ndarray, k: int) -> tuple[float, float]:
    """Expected maximum and minimum of k of the n values drawn without replacement.

    The i-th smallest (from 0) is the maximum of C(i, k - 1) of the C(n, k) subsets; mirrored for the minimum.
    """
    n = len(values)
    chance = np.array([comb(i, k - 1) / comb(n, k) for i in range(n)])
    ascending = np.sort(np.asarray(values, np.float64))
    return float(chance @ ascending), float(chance @ ascending[::-1])


def majority_of(values: np.ndarray, answers: list[str | None], k: int, rng: np.random.Generator) -> float:
    """Expected value of the answer that most of k of the n samples gave, over subsets of k.

    The value of an answer is the mean over the samples that gave it; answers with equally many votes share the win
    equally. A sample without an answer (None) casts no vote. If nobody voted, the subset's mean value counts.
    All subsets are used if there are at most 1000; otherwise ``rng`` samples 1000.
    """
    n = len(values)
    if comb(n, k) <= MAX_SUBSETS:
        subsets = np.array(list(itertools.combinations(range(n), k)))
    else:
        subsets = rng.permuted(np.tile(np.arange(n), (MAX_SUBSETS, 1)), axis=1)[:, :k]

    known = {answer: code for code, answer in enumerate(dict.fromkeys(a for a in answers if a is not None))}
    codes = np.array([len(known) if answer is None else known[answer] for answer in answers])  # None comes last
    ballots = np.eye(len(known) + 1)[codes][subsets]  # (subsets, k, answers), one-hot
    votes = ballots.sum(1)
    totals = (ballots * np.asarray(values, np.float64)[subsets][..., None]).sum(1)
    strength = votes.copy()
    strength[:, -1] = np.minimum(votes[:, -1], 0.5)  # any true vote outranks those without an answer
    winners = strength == strength.max(1, keepdims=True)
    won_value = np.where(winners, totals / np.maximum(votes, 1), 0.0).sum(1) / winners.sum(1)
    return float(won_value.mean())


def _samples(table: pa.Table) -> dict[str, list[dict]]:
    """By data source: each row's group, answer and variables."""
    extras = table["reward_extra"].to_pylist() if "reward_extra" in table.column_names else [None] * len(table)
    samples: dict[str, list[dict]] = defaultdict(list)
    columns = (table[name].to_pylist() for name in ("data_source", "group", "score"))
    for source, group, score, extra_json in zip(*columns, extras, strict=True):
        extra = json.loads(extra_json) if extra_json else {}
        numbers = {name: float(value) for name, value in extra.items() if isinstance(value, int | float)}
        numbers.pop("pred", None)
        pred = extra.get("pred")
        samples[source].append(
            {
                "group": group,
                "has_pred": "pred" in extra,
                "pred": None if pred is None else str(pred),
                "variables": {**numbers, "reward": float(score)},
            }
        )
    return samples


def _variable_metrics(variable: str, by_prompt: dict[int, list[dict]], largest: int, seed: int) -> dict[str, float]:
    """Statistic@k -> its mean over prompts. A prompt with fewer than k samples counts in mean and std only."""
    sizes = sorted({2**i for i in range(1, largest.bit_length()) if 2**i < largest} | {largest} - {1})
    per_prompt: dict[str, list[float]] = defaultdict(list)
    for group, rows in by_prompt.items():
        values = np.array([row["variables"][variable] for row in rows])
        per_prompt[f"mean@{largest}"].append(float(values.mean()))
        if largest > 1:
            per_prompt[f"std@{largest}"].append(float(values.std()))
        for k in sizes:
            if k > len(values):
                continue
            best, worst = best_and_worst_of(values, k)
            per_prompt[f"best@{k}"].append(best)
            per_prompt[f"worst@{k}"].append(worst)
            if all(row["has_pred"] for row in rows):
                answers = [row["pred"] for row in rows]
                rng = np.random.default_rng([seed, group, k])
                per_prompt[f"maj@{k}"].append(majority_of(values, answers, k, rng))
    return {statistic: float(np.mean(values)) for statistic, values in per_prompt.items()}
