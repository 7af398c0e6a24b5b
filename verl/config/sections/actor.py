"""The policy and the reference model."""

from __future__ import annotations

from pydantic import Field

from verl.config.sections.base import AggregationMode, KLKind, PositiveInt, Section, Share, derived
from verl.config.sections.parts import CheckpointConfig, FSDPConfig, OptimConfig, PolicyModelConfig
from verl.config.sections.rollout import RolloutConfig


class PolicyLossConfig(Section):
    loss_mode: str = Field(
        "vanilla",
        description="The policy's loss: vanilla (PPO with dual clip), gspo, cispo, geo_mean, sapo, gpg, clip_cov, "
        "kl_cov, or your own function as package.module:function.",
    )
    clip_cov_ratio: Share = Field(0.0002, description="clip_cov: share of a mini-batch's tokens that learn nothing.")
    clip_cov_lb: float = Field(1.0, description="clip_cov: lower bound of such a token's covariance.")
    clip_cov_ub: float = Field(5.0, description="clip_cov: its upper bound.")
    kl_cov_ratio: Share = Field(0.0002, description="kl_cov: share of a mini-batch's tokens that get a KL penalty.")
    ppo_kl_coef: float = Field(0.1, ge=0, description="kl_cov: weight of that penalty.")


class ActorConfig(Section):
    ppo_mini_batch_size: PositiveInt = Field(
        256, description="Prompts of an optimizer step, over all ranks, each with its rollout.n responses."
    )
    ppo_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None,
        description="Responses of one forward and backward pass of a rank; null: as many as "
        "ppo_max_token_len_per_gpu says. "
        "It changes memory and speed, never the gradient.",
    )
    use_dynamic_bsz: bool = Field(
        False, description="Cut micro-batches by tokens even where a number of responses is set."
    )
    ppo_max_token_len_per_gpu: PositiveInt = Field(
        16384,
        description="Tokens of a micro-batch that is cut by tokens, at most, with its padding; a longer sequence goes "
        "alone. Where sequences are padded, it has fewer if the padding would cost more than another forward.",
    )
    ppo_epochs: PositiveInt = Field(1, description="Passes over a step's trajectories.")
    shuffle: bool = Field(False, description="Draw the mini-batches in a new order each pass.")
    clip_ratio: float = Field(0.2, ge=0, description="Clip range of the probability ratio, on both sides.")
    clip_ratio_low: float = derived("Clip range below 1.", ge=0, lt=1)
    clip_ratio_high: float = derived("Clip range above 1.", ge=0)
    clip_ratio_c: float = Field(
        3.0, gt=1, description="Dual clip: with a negative advantage the loss is at most -advantage times this."
    )
    tau_pos: float = Field(1.0, gt=0, description="sapo: sharpness of its gate where the advantage is positive.")
    tau_neg: float = Field(1.05, gt=0, description="sapo: the same where it is not.")
    policy_loss: PolicyLossConfig = PolicyLossConfig()
    loss_agg_mode: AggregationMode = Field(
        "token-mean",
        description="How the tokens' losses become one number, over the whole mini-batch and all ranks. With gspo, "
        "geo_mean and sapo, whose papers average over responses, the default is seq-mean-token-mean.",
    )
    entropy_coeff: float = Field(0.0, description="Weight of the entropy bonus in the loss.")
    use_kl_loss: bool = Field(False, description="Add the KL divergence from the reference model to the loss.")
    kl_loss_coef: float = Field(0.001, ge=0, description="Weight of that term.")
    kl_loss_type: KLKind = Field(
        "low_var_kl", description="Its estimator: kl or k1, abs, mse or k2, low_var_kl or k3 (Schulman 2020)."
    )
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    optim: OptimConfig = OptimConfig()
    fsdp_config: FSDPConfig = FSDPConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()


class RefConfig(Section):
    log_prob_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Responses of one forward pass of a rank; null: by tokens."
    )
    log_prob_use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even where a number of responses is set.")
    log_prob_max_token_len_per_gpu: PositiveInt = derived("Tokens of a micro-batch that is cut by tokens.")
    fsdp_config: FSDPConfig = FSDPConfig()


class ActorRolloutRefConfig(Section):
    model: PolicyModelConfig
    actor: ActorConfig = ActorConfig()
    ref: RefConfig = RefConfig()
    rollout: RolloutConfig
