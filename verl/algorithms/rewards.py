"""What a step's responses and their tokens are rewarded with: the scorer's score, and what is taken off it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from verl.algorithms.kl import KLControl, apply_kl_penalty, place_scores
from verl.algorithms.overlong import overlong_penalties
from verl.data.ragged import Ragged
from verl.data.schema import ragged

if TYPE_CHECKING:
    from verl.config.sections.models import Config

Metrics = dict[str, float]


def response_rewards(table: pa.Table, config: Config) -> np.ndarray:
    """float64, shape (B,): scores, less the penalty of responses that near the length limit, where that is on."""
    return table["score"].to_numpy() + _penalties(table, config)


def token_rewards(table: pa.Table, config: Config, kl_control: KLControl) -> tuple[Ragged, Metrics]:
    """float32 column: a response's reward on its last token, less the KL penalty of each token where that is on; its
    coefficient then takes its next step.

    Metrics: reward/{overlong_penalty, overlong_share} and actor/{reward_kl_penalty, reward_kl_penalty_coeff} of what is
    on.
    """
    algorithm, mask = config.algorithm, ragged(table, "response_mask")
    metrics: Metrics = {}
    rewards = response_rewards(table, config)
    if config.reward_model.overlong_buffer.enable and len(table):
        penalties = _penalties(table, config)
        metrics["reward/overlong_penalty"] = float(penalties.mean())
        metrics["reward/overlong_share"] = float(np.mean(penalties < 0))
    if not algorithm.use_kl_in_reward:
        return place_scores(rewards, mask), metrics
    coef, log_probs = kl_control.coef, (ragged(table, "old_log_probs"), ragged(table, "ref_log_probs"))
    column, kl = apply_kl_penalty(rewards, *log_probs, mask, coef, algorithm.kl_penalty)
    kl_control.update(kl, table.num_rows)
    return column, metrics | {"actor/reward_kl_penalty": kl, "actor/reward_kl_penalty_coeff": coef}


def _penalties(table: pa.Table, config: Config) -> np.ndarray:
    lengths = ragged(table, "response_ids").lengths
    return overlong_penalties(lengths, config.reward_model.overlong_buffer, config.data.max_response_length)
