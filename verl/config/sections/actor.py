"""The policy and the reference model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from verl.config.sections.base import AggregationMode, KLKind, PositiveInt, Section, Share, derived
from verl.config.sections.effects import POLICY_LOSS, NoEffect, always, cut_by_sequences, cut_by_tokens
from verl.config.sections.parts import CheckpointConfig, FSDPConfig, OptimConfig, PolicyModelConfig
from verl.config.sections.rollout import RolloutConfig

NO_KL_LOSS = NoEffect("the KL loss is off ({section}.use_kl_loss)", lambda actor, run: not actor.use_kl_loss)
BOTH_SIDES_SET = NoEffect(
    "clip_ratio_low and clip_ratio_high are both set",
    lambda actor, run: {f"actor_rollout_ref.actor.clip_ratio_{side}" for side in ("low", "high")} <= run.set_keys,
)
NO_REFERENCE = NoEffect(
    "no reference model is built, neither algorithm.use_kl_in_reward nor actor_rollout_ref.actor.use_kl_loss is on",
    lambda section, run: "reference" not in run.roles,
)
NO_OPTIMIZER = NoEffect("the reference model has no optimizer", always, only=("optimizer_offload",))
ALL_MICRO_BATCHES = ("actor", "critic", "old_log_probs", "ref_log_probs", "reward_scores", "values")


class PolicyLossConfig(Section):
    loss_mode: str = Field(
        "vanilla",
        description="The policy's loss: vanilla (PPO with dual clip), gspo, cispo, geo_mean, sapo, gpg, clip_cov, "
        "kl_cov, or your own function as package.module:function.",
    )
    clip_cov_ratio: Annotated[Share, POLICY_LOSS] = Field(
        0.0002, description="clip_cov: share of a mini-batch's tokens that get no gradient."
    )
    clip_cov_lb: Annotated[float, POLICY_LOSS] = Field(
        1.0, description="clip_cov: lower bound of the covariance of such a token."
    )
    clip_cov_ub: Annotated[float, POLICY_LOSS] = Field(
        5.0, description="clip_cov: upper bound of the covariance of such a token."
    )
    kl_cov_ratio: Annotated[Share, POLICY_LOSS] = Field(
        0.0002, description="kl_cov: share of a mini-batch's tokens that get a KL penalty."
    )
    ppo_kl_coef: Annotated[float, POLICY_LOSS] = Field(0.1, ge=0, description="kl_cov: weight of that penalty.")


class ActorConfig(Section):
    ppo_mini_batch_size: PositiveInt = Field(
        256, description="Prompts per optimizer step over all ranks. Each prompt has rollout.n responses."
    )
    ppo_micro_batch_size_per_gpu: Annotated[PositiveInt | None, cut_by_tokens(*ALL_MICRO_BATCHES)] = Field(
        None,
        description="Responses per forward and backward pass of a rank; null: as many as fit "
        "ppo_max_token_len_per_gpu. It changes memory and speed, never the gradient.",
    )
    use_dynamic_bsz: bool = Field(
        False, description="Cut micro-batches by tokens even if a number of responses is set."
    )
    ppo_max_token_len_per_gpu: Annotated[PositiveInt, cut_by_sequences(*ALL_MICRO_BATCHES)] = Field(
        16384,
        description="Most tokens, padding included, of a micro-batch that is cut by tokens. A longer sequence is a "
        "micro-batch by itself. Padded micro-batches are cut smaller if the padding costs more than another forward.",
    )
    ppo_epochs: PositiveInt = Field(1, description="Passes over a step's trajectories.")
    shuffle: bool = Field(False, description="Use a new random order of the mini-batches in each pass.")
    clip_ratio: Annotated[float, POLICY_LOSS, BOTH_SIDES_SET] = Field(
        0.2, ge=0, description="Clip range of the probability ratio on both sides of 1."
    )
    clip_ratio_low: Annotated[float, POLICY_LOSS] = derived("Clip range below 1.", ge=0, lt=1)
    clip_ratio_high: Annotated[float, POLICY_LOSS] = derived("Clip range above 1.", ge=0)
    clip_ratio_c: Annotated[float, POLICY_LOSS] = Field(
        3.0, gt=1, description="Dual clip: with a negative advantage the loss is at most -advantage times this."
    )
    tau_pos: Annotated[float, POLICY_LOSS] = Field(
        1.0, gt=0, description="sapo: sharpness of its gate for tokens with a positive advantage."
    )
    tau_neg: Annotated[float, POLICY_LOSS] = Field(
        1.05, gt=0, description="sapo: sharpness of its gate for all other tokens."
    )
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    loss_agg_mode: AggregationMode = Field(
        "token-mean",
        description="How the losses of all tokens of a mini-batch, over all ranks, become one number. The default is "
        "seq-mean-token-mean for gspo, geo_mean and sapo, whose papers average over responses.",
    )
    entropy_coeff: float = Field(0.0, description="Weight of the entropy bonus in the loss.")
    use_kl_loss: bool = Field(False, description="Add the KL divergence from the reference model to the loss.")
    kl_loss_coef: Annotated[float, NO_KL_LOSS] = Field(0.001, ge=0, description="Weight of that KL term.")
    kl_loss_type: Annotated[KLKind, NO_KL_LOSS] = Field(
        "low_var_kl",
        description="Estimator of that KL term: kl or k1, abs, mse or k2, low_var_kl or k3 (Schulman 2020).",
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    optim: OptimConfig = OptimConfig()
    fsdp_config: FSDPConfig = FSDPConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class RefConfig(Section):
    log_prob_micro_batch_size_per_gpu: Annotated[PositiveInt | None, cut_by_tokens("ref_log_probs")] = Field(
        None, description="Responses per forward pass of a rank; null: cut by tokens."
    )
    log_prob_use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even if a number of responses is set.")
    log_prob_max_token_len_per_gpu: Annotated[PositiveInt, cut_by_sequences("ref_log_probs")] = derived(
        "Most tokens of a micro-batch that is cut by tokens."
    )
    fsdp_config: Annotated[FSDPConfig, NO_OPTIMIZER] = FSDPConfig()


class ActorRolloutRefConfig(Section):
    model: PolicyModelConfig
    actor: ActorConfig = ActorConfig()
    ref: Annotated[RefConfig, NO_REFERENCE] = RefConfig()
    rollout: RolloutConfig
