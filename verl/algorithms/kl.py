"""KL to the reference: per-token estimators, the penalty inside the reward, and what sets its coefficient.

Estimators after http://joschu.net/blog/kl-approx.html, of KL(policy || reference) from tokens that the policy drew.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch

from verl.data.ragged import Ragged

LOG_RATIO_LIMIT = 20.0  # |log-ratio| beyond it is cut before exp, so that nothing overflows
K3_LIMIT = 10.0  # k3 beyond it is cut: such a token pulls no further (its gradient is 0)


def kl_estimate(log_probs: torch.Tensor, ref_log_probs: torch.Tensor, kind: str) -> torch.Tensor:
    """Per-token KL estimate, the shape and dtype of its inputs. With delta = log_probs - ref_log_probs:

    k1, kl: delta (unbiased; may be negative).
    abs: |delta|.
    k2, mse: delta^2 / 2.
    k3, low_var_kl: exp(-delta) - 1 + delta (unbiased, never negative), delta cut to +-20 and the result to 10.
        Cutting matters only where the policies differ by orders of magnitude; there it bounds one token's part.
    """
    delta = log_probs - ref_log_probs
    match kind:
        case "k1" | "kl":
            return delta
        case "abs":
            return delta.abs()
        case "k2" | "mse":
            return 0.5 * delta.square()
        case "k3" | "low_var_kl":
            delta = delta.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
            return (torch.expm1(-delta) + delta).clamp(max=K3_LIMIT)
    raise ValueError(f"unknown KL estimator {kind!r}: one of k1 (kl), abs, k2 (mse), k3 (low_var_kl)")


def place_scores(scores: np.ndarray, response_mask: Ragged) -> Ragged:
    """float32 token rewards: each row's score on the last token that the policy wrote, 0 elsewhere.

    A row without such a token (a request aborted before its first token) has no place for its score.
    """
    rewards = np.zeros(len(response_mask.values), np.float32)
    written = np.flatnonzero(response_mask.values > 0)
    ends = np.searchsorted(written, response_mask.offsets[1:])  # of each row's among the written tokens
    rows = np.flatnonzero(np.diff(ends, prepend=0))
    rewards[written[ends[rows] - 1]] = scores[rows]
    return response_mask.like(rewards)


def apply_kl_penalty(
    scores: np.ndarray, old_log_probs: Ragged, ref_log_probs: Ragged, response_mask: Ragged, coef: float, kind: str
) -> tuple[Ragged, float]:
    """Token rewards ``score on the last token - coef * KL_t`` (float32), and the batch's KL.

    The batch's KL is the mean over sequences of each one's token mean (sequences without a token left out).
    """
    written = response_mask.values > 0
    policy, reference = (
        torch.from_numpy(column.values.astype(np.float64)) for column in (old_log_probs, ref_log_probs)
    )
    kl = np.where(written, kl_estimate(policy, reference, kind).numpy(), 0.0)
    rewards = place_scores(scores, response_mask).values - coef * kl

    counts = response_mask.row_sums(written)
    token_means = response_mask.row_sums(kl)[counts > 0] / counts[counts > 0]
    return response_mask.like(rewards.astype(np.float32)), float(token_means.mean()) if len(token_means) else 0.0


class KLControl(Protocol):
    """Holds ``coef``, the penalty's coefficient; ``update`` once a step."""

    coef: float

    def update(self, kl: float, num_sequences: int) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FixedKL:
    """The coefficient of the config, always: a resumed run takes the config's, not the checkpoint's."""

    def __init__(self, coef: float):
        self.coef = coef

    def update(self, kl: float, num_sequences: int) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class AdaptiveKL:
    """Steers the KL to ``target`` (Ziegler et al. 2019, arXiv:1909.08593, section 2.2):
    coef *= 1 + clip(KL / target - 1, -0.2, 0.2) * num_sequences / horizon.

    A KL that is not finite leaves the coefficient as it is. The coefficient never goes below 0.
    """

    def __init__(self, coef: float, target: float, horizon: int):
        self.coef = coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_sequences: int) -> None:
        if np.isfinite(kl):
            error = float(np.clip(kl / self.target - 1.0, -0.2, 0.2))
            self.coef = max(0.0, self.coef * (1.0 + error * num_sequences / self.horizon))

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.coef = state.get("coef", self.coef)  # absent: the checkpoint was written under a fixed coefficient


class KLControlSettings(Protocol):
    """The ``algorithm.kl_ctrl`` section."""

    @property
    def type(self) -> str: ...
    @property
    def kl_coef(self) -> float: ...
    @property
    def target_kl(self) -> float: ...
    @property
    def horizon(self) -> int: ...


def kl_control(settings: KLControlSettings) -> KLControl:
    match settings.type:
        case "fixed":
            return FixedKL(settings.kl_coef)
        case "adaptive":
            return AdaptiveKL(settings.kl_coef, settings.target_kl, settings.horizon)
    raise ValueError(f"unknown algorithm.kl_ctrl.type {settings.type!r}: fixed or adaptive")
