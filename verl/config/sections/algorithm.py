"""Advantages, the KL penalty in the reward, and the correction for an engine whose log-probs differ from the
trainer's."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from verl.config.sections.base import KLKind, PositiveInt, Section, Share
from verl.config.sections.effects import ESTIMATOR, NoEffect

KL_FIXED = NoEffect(
    "the KL coefficient is fixed (algorithm.kl_ctrl.type)", lambda kl_ctrl, run: kl_ctrl.type == "fixed"
)
KL_NOT_IN_REWARD = NoEffect(
    "the KL penalty in the reward is off (algorithm.use_kl_in_reward)",
    lambda algorithm, run: not algorithm.use_kl_in_reward,
)
NOT_WEIGHTED = NoEffect(
    "the policy loss is not weighted (algorithm.rollout_correction.level)",
    lambda algorithm, run: algorithm.rollout_correction.level is None,
    spared=("level",),
)
CLAMPED = NoEffect(
    "weights are only cut from above ({section}.mode=clamp)", lambda correction, run: correction.mode == "clamp"
)
NOT_FILTERED = NoEffect(
    "groups are not filtered (algorithm.filter_groups.enable)",
    lambda algorithm, run: not algorithm.filter_groups.enable,
    spared=("enable",),
)


class KLControlConfig(Section):
    type: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed: kl_coef does not change; adaptive: it is steered towards target_kl (Ziegler 2019)."
    )
    kl_coef: float = Field(
        0.001, ge=0, description="Weight of the KL penalty in the reward. Setting it turns the penalty on."
    )
    horizon: Annotated[PositiveInt, KL_FIXED] = Field(
        10000, description="adaptive: number of responses over which kl_coef adjusts."
    )
    target_kl: Annotated[float, KL_FIXED] = Field(0.1, gt=0, description="adaptive: target KL divergence.")


class RolloutCorrectionConfig(Section):
    level: Literal["token", "sequence"] | None = Field(
        None,
        description="Weight the policy loss by the ratio of the trainer's probability to the engine's, per token or "
        "per response; null: no weights.",
    )
    mode: Literal["clamp", "mask"] = Field(
        "clamp", description="Treatment of a weight out of bounds; clamp: cut it to threshold; mask: set it to 0."
    )
    threshold: float = Field(2.0, ge=1, description="Upper bound of a weight.")
    threshold_lower: Annotated[float | None, CLAMPED] = Field(
        None, gt=0, le=1, description="mask: lower bound of a weight; null: none."
    )


class FilterGroupsConfig(Section):
    enable: bool = Field(
        False,
        description="Dynamic sampling: replace prompts whose responses do not differ, until a step's batch is full.",
    )
    metric: str = Field(
        "score",
        description="The number that must differ: score, or another number that the scorer returns, by name (acc).",
    )
    max_num_gen_batches: int = Field(
        0, ge=0, description="Most generation batches of a step. If they do not suffice, the run stops. 0: no limit."
    )


class AlgorithmConfig(Section):
    adv_estimator: str = Field(
        "gae",
        description="Advantages: gae (with a critic); without a critic grpo, rloo, reinforce_plus_plus, "
        "reinforce_plus_plus_baseline, remax, opo, grpo_passk or gpg; or your own function as package.module:function.",
    )
    gamma: Annotated[Share, ESTIMATOR] = Field(
        1.0, description="gae, reinforce_plus_plus: discount of the reward per token."
    )
    lam: Annotated[Share, ESTIMATOR] = Field(1.0, description="gae: lambda.")
    norm_adv_by_std_in_grpo: Annotated[bool, ESTIMATOR] = Field(
        True,
        description="grpo, grpo_passk: divide advantages by the group's standard deviation. False, together with "
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm, is Dr. GRPO.",
    )
    use_kl_in_reward: bool | None = Field(
        None,
        description="Subtract kl_coef times the KL from the reference model from each token's reward; null: only if "
        "kl_coef is set.",
    )
    kl_penalty: Annotated[KLKind, KL_NOT_IN_REWARD] = Field(
        "kl", description="Estimator of that KL: kl or k1, abs, mse or k2, low_var_kl or k3."
    )
    kl_ctrl: Annotated[KLControlConfig, KL_NOT_IN_REWARD] = KLControlConfig()
    rollout_correction: Annotated[RolloutCorrectionConfig, NOT_WEIGHTED] = RolloutCorrectionConfig()
    filter_groups: Annotated[FilterGroupsConfig, NOT_FILTERED] = FilterGroupsConfig()
