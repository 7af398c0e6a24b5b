"""Which tokens of a mini-batch make the policy's entropy fall fastest: those whose log-prob and advantage are high
together (Cui et al. 2025, "The Entropy Mechanism of Reinforcement Learning for Reasoning Language Models",
arXiv:2505.22617).

A selection takes the written tokens' advantages and log-probs, float (T,), and gives the places of those it picks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from verl.config.sections.models import PolicyLossConfig

Select = Callable[[np.ndarray, np.ndarray, "PolicyLossConfig", Sequence[int]], np.ndarray]


def covariances(advantages: np.ndarray, log_probs: np.ndarray) -> np.ndarray:
    """float64, (T,): each token's (A - mean A) (log p - mean log p), equation 10 of the paper."""
    if not len(advantages):
        return np.empty(0)
    centred = (values - values.mean(dtype=np.float64) for values in (advantages, log_probs))
    return np.multiply(*centred)


def some_covariances(
    advantages: np.ndarray, log_probs: np.ndarray, settings: PolicyLossConfig, seed: Sequence[int]
) -> np.ndarray:
    """A share clip_cov_ratio of the tokens (at least one), drawn at random from those with a covariance between
    clip_cov_lb and clip_cov_ub; all of these where they are fewer. The draw is a pure function of the seed."""
    found = covariances(advantages, log_probs)
    candidates = np.flatnonzero((found > settings.clip_cov_lb) & (found < settings.clip_cov_ub))
    noise = np.random.Philox(np.random.SeedSequence(list(seed))).random_raw(len(candidates))
    return candidates[np.argsort(noise, kind="stable")[: _share(settings.clip_cov_ratio, found)]]


def highest_covariances(
    advantages: np.ndarray, log_probs: np.ndarray, settings: PolicyLossConfig, seed: Sequence[int]
) -> np.ndarray:
    """The share kl_cov_ratio of the tokens (at least one) with the highest covariances."""
    found = covariances(advantages, log_probs)
    return np.argsort(-found, kind="stable")[: _share(settings.kl_cov_ratio, found)]


def _share(ratio: float, values: np.ndarray) -> int:
    return max(int(ratio * len(values)), 1)
