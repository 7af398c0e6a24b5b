"""Sums, whitening and masking of ragged columns."""

from __future__ import annotations

import numpy as np

from verl.data.ragged import Ragged, offsets_of

WHITEN_EPS = 1e-8  # added to the variance


def discounted_suffix_sums(rows: Ragged, discount: float) -> Ragged:
    """float64: y_t = x_t + discount * y_{t+1} within each row. One numpy step a position, over all rows at once."""
    sums = np.empty(len(rows.values), np.float64)
    longest_first = np.argsort(-rows.lengths, kind="stable")
    lengths = rows.lengths[longest_first]
    last_token = rows.offsets[1:][longest_first] - 1
    carry = np.zeros(len(rows))
    for back in range(lengths[0] if len(lengths) else 0):  # tokens from the end
        alive = np.searchsorted(-lengths, -back)  # rows longer than `back` come first
        tokens = last_token[:alive] - back
        carry[:alive] = rows.values[tokens] + discount * carry[:alive]
        sums[tokens] = carry[:alive]
    return rows.like(sums)


def whiten(values: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(var + 1e-8), unbiased variance; a single value becomes 0."""
    variance = values.var(ddof=1) if len(values) > 1 else 0.0
    whitened = values - (values.mean() if len(values) else 0.0)
    whitened /= np.sqrt(variance + WHITEN_EPS)
    return whitened


def steps(column: Ragged, kept: np.ndarray) -> Ragged:
    """The column's tokens that the policy wrote."""
    if kept.all():
        return column
    lengths = column.row_sums(kept).astype(np.int64)
    return Ragged(column.values[kept], offsets_of(lengths))


def scatter(values: np.ndarray, mask: Ragged, kept: np.ndarray) -> Ragged:
    """float32: values on the kept tokens, zero elsewhere."""
    if len(values) == len(mask.values):
        return mask.like(values.astype(np.float32))
    full = np.zeros(len(mask.values), np.float32)
    full[kept] = values
    return mask.like(full)
