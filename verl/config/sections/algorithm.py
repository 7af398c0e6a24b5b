"""Advantages, the KL penalty in the reward, and what makes up for an engine whose log-probs are not the trainer's."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from verl.config.sections.base import KLKind, PositiveInt, Section, Share


class KLControlConfig(Section):
    type: Literal["fixed", "adaptive"] = Field(
        "fixed", description="fixed: kl_coef throughout; adaptive: it is steered towards target_kl (Ziegler 2019)."
    )
    kl_coef: float = Field(
        0.001, ge=0, description="Weight of the KL penalty in the reward. Setting it turns the penalty on."
    )
    horizon: PositiveInt = Field(10000, description="adaptive: responses over which kl_coef adjusts.")
    target_kl: float = Field(0.1, gt=0, description="adaptive: the KL divergence aimed at.")


class RolloutCorrectionConfig(Section):
    level: Literal["token", "sequence"] | None = Field(
        None,
        description="Weight the policy loss by the trainer's probability over the engine's, of each token or of the "
        "whole response; null: do not.",
    )
    mode: Literal["clamp", "mask"] = Field(
        "clamp",
        description="What becomes of a weight out of bounds; clamp: it is cut to threshold; mask: it is 0, and nothing "
        "learnt there.",
    )
    threshold: float = Field(2.0, ge=1, description="Upper bound of a weight.")
    threshold_lower: float | None = Field(
        None, gt=0, le=1, description="mask: lower bound of a weight, too; null: none."
    )


class FilterGroupsConfig(Section):
    enable: bool = Field(
        False,
        description="Dynamic sampling: a prompt whose responses do not differ is replaced by another, until a step's "
        "batch is full.",
    )
    metric: str = Field(
        "score", description="What must differ: score, or the name of another number that the scorer returns (acc)."
    )
    max_num_gen_batches: int = Field(
        0, ge=0, description="Generations of a step; past it the run stops. 0: as many as it takes."
    )


class AlgorithmConfig(Section):
    adv_estimator: str = Field(
        "gae",
        description="Advantages: gae (with a critic); without one grpo, rloo, reinforce_plus_plus, "
        "reinforce_plus_plus_baseline, remax, opo, grpo_passk or gpg; or your own function as package.module:function.",
    )
    gamma: Share = Field(1.0, description="gae, reinforce_plus_plus: discount of a reward one token later.")
    lam: Share = Field(1.0, description="GAE's lambda.")
    norm_adv_by_std_in_grpo: bool = Field(
        True,
        description="grpo, grpo_passk: divide advantages by the group's standard deviation; off, with "
        "actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum-norm: Dr. GRPO.",
    )
    use_kl_in_reward: bool | None = Field(
        None,
        description="Take kl_coef times the KL from the reference off each token's reward; null: if kl_coef is set.",
    )
    kl_penalty: KLKind = Field("kl", description="Its estimator: kl or k1, abs, mse or k2, low_var_kl or k3.")
    kl_ctrl: KLControlConfig = KLControlConfig()
    rollout_correction: RolloutCorrectionConfig = RolloutCorrectionConfig()
    filter_groups: FilterGroupsConfig = FilterGroupsConfig()
