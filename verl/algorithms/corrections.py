"""Importance weights for the policy loss, where the engine that drew the tokens is not quite the policy trained.

The engine draws from q, the trainer's forward of the same weights gives p (``old_log_probs``): other kernels, other
rounding. The policy gradient then wants each term times p / q. Cut from above, such weights trade a little bias for a
bounded variance: truncated importance sampling (Ionides 2008, "Truncated Importance Sampling"; for this mismatch Yao
et al. 2025, "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", token level). Setting to 0 what
is out of bounds is its masked form (Liu et al. 2025, "When Speed Kills Stability", token and sequence level).

PPO's own ratio stays that of the policy being updated to p, so that clipping does what it does without the weights
(the three policies of Hilton et al. 2021, arXiv:2110.00641).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from verl.algorithms.kl import LOG_RATIO_LIMIT
from verl.data.ragged import Ragged

Metrics = dict[str, float]


class CorrectionSettings(Protocol):
    """The ``algorithm.rollout_correction`` section."""

    @property
    def level(self) -> str | None: ...
    @property
    def mode(self) -> str: ...
    @property
    def threshold(self) -> float: ...
    @property
    def threshold_lower(self) -> float | None: ...


def importance_weights(
    old_log_probs: Ragged, rollout_log_probs: Ragged, response_mask: Ragged, settings: CorrectionSettings
) -> tuple[Ragged, Metrics]:
    """float32 weight of every token in the policy loss, 0 where the mask is 0; and metrics. Constants: no gradient.

    With r = p / q, log r cut to +-20:
    level token: r of the token. sequence: the product of r over the tokens of the response that the policy wrote; each
        of them gets it.
    mode clamp: min(r, threshold). mask: r where threshold_lower <= r <= threshold (no lower bound if null), else 0.

    Where a log-prob of either is nan, nothing is known of r: the weight is 0. A token of weight 0 still counts in the
    averages of the loss, so that the others weigh what they did.

    Metrics: training/rollout_is_{mean,max,min} of the weights, rollout_is_cut (the share that was out of bounds) and
    rollout_is_eff_sample_size, (sum w)^2 / (n sum w^2), from 0 to 1; over tokens, or over sequences at their level.
    """
    written = response_mask.values > 0
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = old_log_probs.values.astype(np.float64) - rollout_log_probs.values
    log_ratio, counted = np.where(written, difference, 0.0), written
    if settings.level == "sequence":
        log_ratio, counted = response_mask.row_sums(log_ratio), response_mask.row_sums(written) > 0
    ratio = np.exp(np.clip(log_ratio, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))
    weights, cut = _bounded(ratio, settings)
    metrics = _metrics(weights[counted], cut[counted])
    if settings.level == "sequence":
        weights = response_mask.spread(weights)
    return response_mask.like(np.where(written, weights, 0.0).astype(np.float32)), metrics


def _bounded(ratio: np.ndarray, settings: CorrectionSettings) -> tuple[np.ndarray, np.ndarray]:
    """Weights, and where the ratio was out of bounds."""
    if settings.mode == "clamp":
        inside = ratio <= settings.threshold
        return np.where(np.isnan(ratio), 0.0, np.minimum(ratio, settings.threshold)), ~inside
    inside = (ratio >= (settings.threshold_lower or 0.0)) & (ratio <= settings.threshold)
    return np.where(inside, ratio, 0.0), ~inside


def _metrics(weights: np.ndarray, cut: np.ndarray) -> Metrics:
    if not len(weights):
        return {}
    squares = float(np.sum(weights**2))
    return {
        "training/rollout_is_mean": float(weights.mean()),
        "training/rollout_is_max": float(weights.max()),
        "training/rollout_is_min": float(weights.min()),
        "training/rollout_is_cut": float(cut.mean()),
        "training/rollout_is_eff_sample_size": float(weights.sum() ** 2 / (len(weights) * squares)) if squares else 0.0,
    }
