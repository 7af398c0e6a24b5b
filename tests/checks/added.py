"""An estimator, a policy loss and a scorer as a contributor would add them: a file, and a row of a registry each."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from verl.algorithms.advantages import AdvantageInputs, Estimator
from verl.algorithms.policy_losses import PolicyTokens
from verl.config.policy_losses import LossMode
from verl.config.sections.models import ActorConfig
from verl.data.ragged import Ragged
from verl.reward.scorers import BuiltIn


def values_alone(inputs: AdvantageInputs) -> tuple[Ragged, Ragged]:
    """Each token's reward times gamma, less its value."""
    assert inputs.values is not None
    advantages = inputs.settings.gamma * inputs.token_rewards.values - inputs.values.values
    advantages = inputs.response_mask.like(advantages.astype(np.float32))
    return advantages, advantages


def off_engine(tokens: PolicyTokens, settings: ActorConfig) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A policy gradient weighted by tau_pos and the engine's own probability of the token."""
    weight = torch.exp(tokens.columns["rollout_log_probs"]) * settings.tau_pos
    return -weight * tokens.advantages * tokens.log_probs, {}


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict[str, Any]) -> float:
    return float(solution_str.startswith(ground_truth))


ESTIMATOR = Estimator("values_alone", values_alone, needs_critic=True, reads=frozenset({"gamma"}))
LOSS = LossMode(
    "off_engine",
    "added:off_engine",
    reads=frozenset({"tau_pos"}),
    averages="seq-mean-token-sum",
    columns=("rollout_log_probs",),
)
SCORER = BuiltIn(compute_score)
