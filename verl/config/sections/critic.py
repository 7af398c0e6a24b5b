"""The value model."""

from __future__ import annotations

from pydantic import Field

from verl.config.sections.base import AggregationMode, PositiveInt, Section, derived
from verl.config.sections.parts import CheckpointConfig, FSDPConfig, ModelConfig, OptimConfig


class CriticModelConfig(ModelConfig):
    fsdp_config: FSDPConfig = FSDPConfig()


class CriticOptimConfig(OptimConfig):
    lr: float = Field(1e-5, gt=0, description="Learning rate after warm-up.")


class CriticConfig(Section):
    enable: bool | None = Field(None, description="Build a critic; null: when the advantages need values (gae).")
    model: CriticModelConfig
    optim: CriticOptimConfig = CriticOptimConfig()
    ppo_mini_batch_size: PositiveInt = derived("Prompts of an optimizer step, over all ranks.")
    ppo_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Responses of one forward and backward pass of a rank."
    )
    forward_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Responses of one forward pass of a rank, when values are computed."
    )
    use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even where a number of responses is set.")
    ppo_max_token_len_per_gpu: PositiveInt = Field(
        32768, description="Tokens of a micro-batch of the update that is cut by tokens."
    )
    forward_max_token_len_per_gpu: PositiveInt = derived(
        "Tokens of a micro-batch that is cut by tokens, when values are computed."
    )
    ppo_epochs: PositiveInt = derived("Passes over a step's trajectories.")
    shuffle: bool = derived("Draw the mini-batches in a new order each pass.")
    cliprange_value: float = Field(
        0.5, gt=0, description="How far a value may move from its old one before it is clipped."
    )
    loss_agg_mode: AggregationMode = derived("How the tokens' losses become one number.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    checkpoint: CheckpointConfig = CheckpointConfig()
