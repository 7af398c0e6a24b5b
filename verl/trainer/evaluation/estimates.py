"""pass@k and mean scores of sampled responses, with confidence intervals over prompts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np

from verl.errors import UserError

ALL = "all"


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts, and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Summary:
    """The results of one data source. estimates: "score", then "pass@k" for each k."""

    prompts: int
    responses: int
    estimates: dict[str, Estimate]


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that at least one of k of the n responses is right: ``1 - C(n - c, k) / C(n, k)``, an unbiased
    estimate of pass@k (Chen et al. 2021, arXiv:2107.03374, equation 1). k is at most n."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def sizes_of(asked: Sequence[int], most: int) -> list[int]:
    """The values of k for pass@k; by default 1, 2, 4, ... and ``most``, the largest number of responses to a prompt."""
    if too_large := [k for k in asked if k > most]:
        raise UserError(f"eval.k={list(asked)}: no prompt has {min(too_large)} responses; the most is {most}")
    return sorted(set(asked)) or sorted({2**i for i in range(most.bit_length())} | {most})


def summarise(
    sources: Sequence[str],
    groups: Sequence[int],
    scores: Sequence[float],
    passed: Sequence[bool],
    *,
    sizes: Sequence[int],
    draws: int,
    confidence: float,
    seed: int,
) -> dict[str, Summary]:
    """Results by data source; if there are several, also for all of them together.

    The sequences have one entry per response. Responses to one prompt share their group. A prompt with fewer than k
    responses does not count in pass@k. draws: number of bootstrap resamples.
    """
    prompts: dict[str, dict[int, list[tuple[float, bool]]]] = defaultdict(lambda: defaultdict(list))
    for source, group, score, right in zip(sources, groups, scores, passed, strict=True):
        prompts[source][group].append((score, right))
    if len(prompts) > 1:
        prompts[ALL] = {group: rows for of_source in list(prompts.values()) for group, rows in of_source.items()}
    return {source: _summary(found, sizes, draws, confidence, seed) for source, found in prompts.items()}


def _summary(
    prompts: Mapping[int, list[tuple[float, bool]]], sizes: Sequence[int], draws: int, confidence: float, seed: int
) -> Summary:
    values: dict[str, list[float]] = defaultdict(list)
    for rows in prompts.values():
        values["score"].append(float(np.mean([score for score, _ in rows])))
        for k in sizes:
            if k <= len(rows):
                values[f"pass@{k}"].append(pass_at_k(len(rows), sum(right for _, right in rows), k))
    estimates = {name: bootstrapped(np.array(each), draws, confidence, seed) for name, each in values.items()}
    return Summary(len(prompts), sum(map(len, prompts.values())), estimates)


def bootstrapped(values: np.ndarray, draws: int, confidence: float, seed: int) -> Estimate:
    """The mean of ``values``, shape (P,), one per prompt, with a bootstrap confidence interval (Efron 1979).

    The interval's bounds are percentiles of the means of ``draws`` resamples of P prompts with replacement. It shows
    how much the mean would vary with other prompts.
    """
    random = np.random.default_rng(seed)
    means = [values[random.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    outside = 100 * (1 - confidence) / 2
    low, high = np.percentile(means, [outside, 100 - outside])
    return Estimate(float(values.mean()), float(low), float(high))
