"""Drawing tokens: against transformers' filters, plain softmax, and the statistics that the noise must have."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from verl.rollout.contract.base import SamplingParams
from verl.rollout.embedded.sampling import SamplingRows, exponential_noise, filter_floor, row_keys, sample_tokens


def noise(seeds: np.ndarray, positions: np.ndarray, vocabulary: int) -> np.ndarray:
    """Uniform numbers: the exponential noise through its distribution function. Shape (B, V), float64."""
    keys = row_keys(seeds.astype(np.uint64), positions.astype(np.int64))
    return -np.expm1(-exponential_noise(keys, vocabulary).double().numpy())


def rows_of(count: int, **params) -> SamplingRows:
    return SamplingRows.of([SamplingParams(**{"seed": seed, **params}) for seed in range(count)])


def chi_square_of_bins(uniform: np.ndarray, bins: int) -> float:
    """Standard deviations by which the chi-square statistic of equal bins is over its mean."""
    counts = np.bincount((uniform.ravel() * bins).astype(int).clip(max=bins - 1), minlength=bins)
    expected = uniform.size / bins
    statistic = ((counts - expected) ** 2 / expected).sum()
    return (statistic - (bins - 1)) / math.sqrt(2 * (bins - 1))


# --- noise -----------------------------------------------------------------------------------------------------------

GRIDS = {
    "tokens": (np.zeros(1), np.zeros(1), 400_000),
    "seeds in a row": (np.arange(100_000), np.zeros(100_000), 4),
    "positions in a row": (np.full(100_000, 12345), np.arange(100_000), 4),
    "large seeds": ((1 << 62) + np.arange(100_000), np.full(100_000, 7), 4),
    "all together": (np.repeat(np.arange(64), 64), np.tile(np.arange(64), 64), 100),
}


@pytest.mark.parametrize("grid", GRIDS)
def test_noise_is_uniform_along(grid):
    uniform = noise(*GRIDS[grid])
    assert abs(chi_square_of_bins(uniform, 1000)) < 5
    ordered = np.sort(uniform.ravel())
    distance = np.abs(ordered - (np.arange(len(ordered)) + 0.5) / len(ordered)).max()
    assert distance * math.sqrt(len(ordered)) < 2.2  # Kolmogorov-Smirnov, exceeded once in 8000 times


def test_noise_is_fine_where_the_winners_are():
    """The least of 2 million exponentials is near 5e-7, and all small ones differ: no plateau near 0."""
    keys = row_keys(np.arange(20, dtype=np.uint64), np.zeros(20, np.int64))
    least = np.sort(exponential_noise(keys, 100_000).numpy().ravel())[:200]
    assert 1e-8 < least[0] < 1e-5
    assert len(np.unique(least)) == 200
    assert abs(least[199] * 2e6 / 200 - 1) < 0.4


def assert_independent(a: np.ndarray, b: np.ndarray) -> None:
    """By the joint distribution of uniform pairs, not only its correlation."""
    cells = (a * 16).astype(int) * 16 + (b * 16).astype(int)
    assert abs(chi_square_of_bins(cells / 256, 256)) < 5
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) * math.sqrt(a.size) < 5


def test_noise_is_independent_between_neighbours_in_seed_position_and_token():
    count, vocabulary = 500, 512
    both = noise(np.repeat(np.arange(count), 2), np.tile(np.arange(2), count), vocabulary)
    here, next_position = both[::2], both[1::2]
    assert_independent(here, next_position)
    assert_independent(here[:-1], here[1:])  # next seed
    assert_independent(here[:, :-1], here[:, 1:])  # next token
    assert_independent(here[:, 1:], next_position[:, :-1])
    for bit in range(9):
        assert_independent(here, here[:, np.arange(vocabulary) ^ (1 << bit)])


def test_noise_is_independent_between_a_seed_at_a_position_and_the_two_swapped():
    numbers, zeros = np.arange(1, 500), np.zeros(499)
    assert_independent(noise(numbers, zeros, 500), noise(zeros, numbers, 500))


@pytest.mark.parametrize("half", [0, 1])
def test_either_half_of_a_key_makes_other_noise(half):
    """Among many rows some share 32 of their 64 bits."""
    keys = row_keys(np.arange(500, dtype=np.uint64), np.zeros(500, np.int64))
    others = keys.copy()
    others[:, half] = row_keys(np.arange(500, 1000, dtype=np.uint64), np.zeros(500, np.int64))[:, half]
    a, b = (-np.expm1(-exponential_noise(each, 500).double().numpy()) for each in (keys, others))
    assert_independent(a, b)


def test_noise_does_not_depend_on_the_other_rows_or_the_size_of_the_vocabulary():
    seeds, positions = np.arange(10, dtype=np.uint64), np.arange(10)
    many = exponential_noise(row_keys(seeds, positions), 1000)
    one = exponential_noise(row_keys(seeds[3:4], positions[3:4]), 100)
    assert torch.equal(many[3:4, :100], one)
    assert torch.equal(many, exponential_noise(row_keys(seeds, positions), 1000))


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}], ids=str)
def test_tokens_are_generated_as_often_as_softmax_says(params):
    count = 40_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    rows = rows_of(count, **params)
    tokens, _ = sample_tokens(logits.expand(count, -1), rows, np.zeros(count, np.int64))
    scaled = logits[None] / params.get("temperature", 1.0)
    probs = scaled.masked_fill(scaled < filter_floor(scaled, rows[:1]), -torch.inf).softmax(-1)[0].double()
    counts = torch.bincount(tokens, minlength=12).double()
    assert (counts[probs == 0] == 0).all()
    expected = probs[probs > 0] * count
    statistic = ((counts[probs > 0] - expected) ** 2 / expected).sum()
    freedom = len(expected) - 1
    assert (statistic - freedom) / math.sqrt(2 * freedom) < 5


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    top_k=st.sampled_from([-1, 1, 2, 7, 40, 200]),
    top_p=st.sampled_from([1.0, 0.99, 0.7, 0.2, 0.01]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 0.9]),
)
def test_filters_keep_what_transformers_warpers_keep(seed, top_k, top_p, min_p):
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(seed)) * 3
    expected = logits
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    if min_p > 0:
        expected = MinPLogitsWarper(min_p)(None, expected)
    kept = logits >= filter_floor(logits, rows_of(4, top_k=top_k, top_p=top_p, min_p=min_p))
    assert torch.equal(kept, expected > -torch.inf)


@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0], ids=["flat", "middling", "sharp"])
def test_filters_keep_what_transformers_warpers_keep_of_a_large_vocabulary(scale):
    logits = torch.randn(6, 5000, generator=torch.Generator().manual_seed(0)) * scale
    params = [(-1, 0.9), (2000, 0.99), (-1, 1.0), (30, 0.5), (1500, 1.0), (-1, 0.01)]
    rows = SamplingRows.of([SamplingParams(top_k=top_k, top_p=top_p) for top_k, top_p in params])
    kept = logits >= filter_floor(logits, rows)
    for row, (top_k, top_p) in enumerate(params):
        expected = logits[row : row + 1]
        if top_k > 0:
            expected = TopKLogitsWarper(top_k)(None, expected)
        if top_p < 1:
            expected = TopPLogitsWarper(top_p)(None, expected)
        # Cumulated in another order, a nucleus of thousands may end one token sooner or later.
        assert (kept[row] ^ (expected[0] > -torch.inf)).sum() <= 1


def test_rows_with_different_settings_are_generated_as_each_alone():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(1)) * 2
    params = [
        SamplingParams(seed=1),
        SamplingParams(seed=2, temperature=0),
        SamplingParams(seed=3, temperature=0.3, top_k=4),
        SamplingParams(seed=4, top_p=0.5),
        SamplingParams(seed=5, min_p=0.2, temperature=1.8),
        SamplingParams(seed=6, top_k=20, top_p=0.9),
    ]
    positions = np.array([0, 5, 2, 9, 1, 0])
    together = sample_tokens(logits, SamplingRows.of(params), positions)
    for row in range(6):
        alone = sample_tokens(logits[row : row + 1], SamplingRows.of(params[row : row + 1]), positions[row : row + 1])
        assert torch.equal(together[0][row], alone[0][0])
        torch.testing.assert_close(together[1][row], alone[1][0], atol=1e-6, rtol=0)


def test_a_large_vocabulary_generated_in_pieces_is_generated_as_in_one():
    logits = torch.randn(9, 200_000, generator=torch.Generator().manual_seed(2))
    banned = [(1, [3, 4]), (8, [5])]
    tokens, log_probs = sample_tokens(logits, rows_of(9), np.arange(9), banned)
    for row in range(9):
        only = [(0, ids) for index, ids in banned if index == row]
        alone, _ = sample_tokens(logits[row : row + 1], rows_of(9)[row : row + 1], np.array([row]), only)
        assert tokens[row] == alone[0]
    expected = logits.double().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    torch.testing.assert_close(log_probs.double(), expected, atol=1e-5, rtol=0)


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.zeros(3, 20)
    logits[0, [4, 9]] = 1
    logits[1, [19, 2, 3]] = 5
    tokens, log_probs = sample_tokens(logits, rows_of(3, temperature=0), np.zeros(3, np.int64))
    assert tokens.tolist() == [4, 2, 0]
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0])


def test_banned_tokens_are_never_generated_and_count_in_log_probs():
    logits = torch.randn(200, 10, generator=torch.Generator().manual_seed(3))
    logits[:, 7] += 5
    for params in ({}, {"temperature": 0}, {"top_k": 1}, {"top_p": 0.1}):
        banned = [(row, (7, 8)) for row in range(0, 200, 2)]
        tokens, log_probs = sample_tokens(logits, rows_of(200, **params), np.zeros(200, np.int64), banned)
        assert not set(tokens[::2].tolist()) & {7, 8}
        assert 7 in tokens[1::2].tolist()
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        torch.testing.assert_close(log_probs, expected, atol=1e-5, rtol=0)


def test_logits_in_half_precision_are_generated_in_float32():
    logits = torch.randn(5, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    tokens, log_probs = sample_tokens(logits, rows_of(5), np.zeros(5, np.int64))
    expected, expected_log_probs = sample_tokens(logits.float(), rows_of(5), np.zeros(5, np.int64))
    assert torch.equal(tokens, expected)
    assert torch.equal(log_probs, expected_log_probs)
    assert log_probs.dtype == torch.float32


def test_small_changes_of_the_logits_rarely_change_the_generated_token():
    """What makes a seed repeatable over batches of other sizes, where logits differ by rounding."""
    logits = torch.randn(20_000, 50, generator=torch.Generator().manual_seed(5))
    jitter = torch.randn(20_000, 50, generator=torch.Generator().manual_seed(6)) * 1e-6
    tokens, _ = sample_tokens(logits, rows_of(20_000), np.zeros(20_000, np.int64))
    moved, _ = sample_tokens(logits + jitter, rows_of(20_000), np.zeros(20_000, np.int64))
    assert (tokens != moved).sum() <= 2
