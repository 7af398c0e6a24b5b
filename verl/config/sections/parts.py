"""Sections that several roles share: which model, how it is optimised, how it is spread over devices, what is saved."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from verl.config.sections.base import CountOrAll, DType, Section, Share, derived


class ModelConfig(Section):
    """A model to load, whatever its head."""

    path: str = Field(description="Model folder in Hugging Face format, or a hub id.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    enable_gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass instead of storing them: less memory, more time."
    )
    use_remove_padding: bool = Field(
        True,
        description="Pack the sequences of a micro-batch end to end, so that no compute goes into padding. "
        "On GPUs in 16-bit types; elsewhere they are padded.",
    )
    attn_implementation: str = Field("sdpa", description="Attention of transformers: sdpa, eager, flash_attention_2.")
    override_config: dict[str, Any] = Field({}, description="Entries of the model's config.json to replace.")


class PolicyModelConfig(ModelConfig):
    tokenizer_path: str = derived("Folder or hub id of the tokenizer.")


class OptimConfig(Section):
    """AdamW and its learning-rate schedule, which moves once a step of the run."""

    lr: float = Field(1e-6, gt=0, description="Learning rate after warm-up.")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay.")
    eps: float = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    lr_warmup_steps: int = Field(
        -1, ge=-1, description="Steps over which the learning rate rises from 0; -1: lr_warmup_steps_ratio decides."
    )
    lr_warmup_steps_ratio: Share = Field(0.0, description="Warm-up as a share of all steps.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after warm-up."
    )
    min_lr_ratio: Share = Field(0.0, description="Where linear and cosine end, as a share of lr.")


class SFTOptimConfig(OptimConfig):
    lr: float = Field(1e-5, gt=0, description="Learning rate after warm-up.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")


class FSDPConfig(Section):
    param_offload: bool = Field(
        False,
        description="Keep the weights in host memory while this model is not in use (4 bytes a parameter over all "
        "GPUs, 2 in bfloat16 on one GPU or untrained).",
    )
    optimizer_offload: bool = Field(
        False,
        description="Keep the optimizer's state on the host; in an update too, part by part, where it would not fit "
        "(8 bytes a parameter over all GPUs, 12 in bfloat16 on one GPU).",
    )
    fsdp_size: CountOrAll = Field(
        -1, description="Ranks over which the weights are sharded, replicated over the others; -1: all."
    )
    reshard_after_forward: bool = Field(
        True,
        description="Free each layer's gathered weights after its forward and backward. False: they are gathered once "
        "for an optimizer step or for all forwards of a stage, and stay until its end, which is faster where memory "
        "allows (2 bytes a parameter in bfloat16).",
    )
    use_torch_compile: bool = Field(
        True, description="On GPUs, compile the layers and the work on logits: faster, after a minute at the start."
    )
    dtype: DType = Field(
        "auto",
        description="Type of the computation; master weights are always float32. auto: bfloat16 on GPUs, else float32.",
    )


class CheckpointConfig(Section):
    save_contents: list[Literal["model", "optimizer", "extra", "hf_model"]] = Field(
        ["model", "optimizer", "extra"],
        description="What a checkpoint holds; extra: schedule and counters; hf_model: also a Hugging Face export.",
    )
