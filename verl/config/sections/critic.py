"""The value model."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from verl.config.sections.base import AggregationMode, PositiveInt, Section, derived
from verl.config.sections.effects import cut_by_sequences, cut_by_tokens
from verl.config.sections.parts import CheckpointConfig, FSDPConfig, ModelConfig, OptimConfig


class CriticModelConfig(ModelConfig):
    fsdp_config: FSDPConfig = FSDPConfig()


class CriticOptimConfig(OptimConfig):
    lr: float = Field(1e-5, gt=0, description="Learning rate after warm-up.")


class CriticConfig(Section):
    enable: bool | None = Field(None, description="Build a critic; null: only if the advantages need values (gae).")
    model: CriticModelConfig
    optim: CriticOptimConfig = CriticOptimConfig()
    ppo_mini_batch_size: PositiveInt = derived("Prompts per optimizer step over all ranks.")
    ppo_micro_batch_size_per_gpu: Annotated[PositiveInt | None, cut_by_tokens("critic", "values")] = Field(
        None, description="Responses per forward and backward pass of a rank."
    )
    forward_micro_batch_size_per_gpu: Annotated[PositiveInt | None, cut_by_tokens("values")] = Field(
        None, description="Responses per forward pass of a rank that computes values."
    )
    use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even if a number of responses is set.")
    ppo_max_token_len_per_gpu: Annotated[PositiveInt, cut_by_sequences("critic", "values")] = Field(
        32768, description="Most tokens of a micro-batch of the update that is cut by tokens."
    )
    forward_max_token_len_per_gpu: Annotated[PositiveInt, cut_by_sequences("values")] = derived(
        "Most tokens of a micro-batch that is cut by tokens, in a forward pass that computes values."
    )
    ppo_epochs: PositiveInt = derived("Passes over a step's trajectories.")
    shuffle: bool = derived("Use a new random order of the mini-batches in each pass.")
    cliprange_value: float = Field(
        0.5, gt=0, description="Largest change of a value from its old one before the loss clips it."
    )
    loss_agg_mode: AggregationMode = derived("How the losses of all tokens become one number.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")
    checkpoint: CheckpointConfig = CheckpointConfig()
