"""Sampling parameters of training and validation, from the settings."""

from __future__ import annotations

from dataclasses import replace

from verl.config.sections.models import EngineConfig, RolloutConfig
from verl.rollout.contract.base import SamplingParams


def training_sampling(rollout: EngineConfig, max_new_tokens: int) -> SamplingParams:
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        min_p=rollout.min_p,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
        ignore_eos=rollout.ignore_eos,
    )


def greedy(sampling: SamplingParams) -> SamplingParams:
    return replace(sampling, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0)


def validation_sampling(rollout: RolloutConfig, max_new_tokens: int) -> SamplingParams:
    chosen = rollout.val_kwargs
    return SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=chosen.temperature if chosen.do_sample else 0.0,
        top_p=chosen.top_p,
        top_k=chosen.top_k,
        stop=tuple(rollout.stop),
        stop_token_ids=tuple(rollout.stop_token_ids),
    )
