"""Sections that several roles share: the model, its optimizer, its placement on devices, its checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from verl.config.sections.base import CountOrAll, DType, Section, Share, derived
from verl.config.sections.effects import NO_CHECKPOINT, NO_OFFLOAD, ONE_RANK, NoEffect, on_cpu

PADDED = NoEffect("the run is on a CPU, where each micro-batch is padded to its longest sequence", on_cpu)
NOT_COMPILED = NoEffect("the run is on a CPU, where nothing is compiled", on_cpu)
STEPS_SET = NoEffect("{section}.lr_warmup_steps is set", lambda optim, run: optim.lr_warmup_steps >= 0)
CONSTANT = NoEffect(
    "the schedule is constant ({section}.lr_scheduler_type)", lambda optim, run: optim.lr_scheduler_type == "constant"
)
ALWAYS_WHOLE = NoEffect(
    "it leaves out model, optimizer or extra: a checkpoint always holds these three, and hf_model may be added",
    lambda checkpoint, run: not {"model", "optimizer", "extra"} <= set(checkpoint.save_contents),
)


class ModelConfig(Section):
    """A model to load, whatever its head."""

    path: str = Field(description="Model folder in Hugging Face format, or a hub id.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")
    enable_gradient_checkpointing: bool = Field(
        True, description="Recompute activations in the backward pass instead of storing them: less memory, more time."
    )
    use_remove_padding: Annotated[bool, PADDED] = Field(
        True,
        description="Pack the sequences of a micro-batch end to end, so that no compute is spent on padding. "
        "Needs a GPU and a 16-bit type; otherwise sequences are padded.",
    )
    attn_implementation: str = Field("sdpa", description="Attention of transformers: sdpa, eager, flash_attention_2.")
    override_config: dict[str, Any] = Field({}, description="Entries that replace those of the model's config.json.")


class PolicyModelConfig(ModelConfig):
    tokenizer_path: str = derived("Folder or hub id of the tokenizer.")


class OptimConfig(Section):
    """AdamW and its learning-rate schedule, which moves once per step of the run."""

    lr: float = Field(1e-6, gt=0, description="Learning rate after warm-up.")
    betas: tuple[Share, Share] = Field((0.9, 0.999), description="AdamW's decay rates of the two moments.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay.")
    eps: float = Field(1e-8, gt=0, description="Added to AdamW's denominator.")
    lr_warmup_steps: int = Field(
        -1, ge=-1, description="Steps over which the learning rate rises from 0; -1: lr_warmup_steps_ratio decides."
    )
    lr_warmup_steps_ratio: Annotated[Share, STEPS_SET] = Field(0.0, description="Warm-up as a share of all steps.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="Course of the learning rate after warm-up."
    )
    min_lr_ratio: Annotated[Share, CONSTANT] = Field(
        0.0, description="Last learning rate of linear and cosine, as a share of lr."
    )


class SFTOptimConfig(OptimConfig):
    lr: float = Field(1e-5, gt=0, description="Learning rate after warm-up.")
    grad_clip: float = Field(1.0, gt=0, description="Largest norm of the gradient.")


class FSDPConfig(Section):
    param_offload: Annotated[bool, NO_OFFLOAD] = Field(
        False,
        description="Keep the weights in host memory while this model is not in use. It takes 4 bytes per parameter "
        "over all GPUs; 2 in bfloat16 on one GPU or for a model that is not trained.",
    )
    optimizer_offload: Annotated[bool, NO_OFFLOAD] = Field(
        False,
        description="Keep the optimizer's state in host memory. If it does not fit on the GPU during an update, it is "
        "streamed through in chunks. It takes 8 bytes per parameter over all GPUs; 12 in bfloat16 on one GPU.",
    )
    fsdp_size: Annotated[CountOrAll, ONE_RANK] = Field(
        -1, description="Number of ranks that share one sharded copy of the weights; -1: all."
    )
    reshard_after_forward: Annotated[bool, ONE_RANK] = Field(
        True,
        description="Free each layer's gathered weights after its forward and after its backward. False: gather them "
        "once per optimizer step, or once per stage of forwards, which is faster and takes 2 bytes per parameter in "
        "bfloat16.",
    )
    use_torch_compile: Annotated[bool, NOT_COMPILED] = Field(
        True, description="On GPUs, compile the layers and the work on logits. It is faster after the first minute."
    )
    dtype: DType = Field(
        "auto",
        description="Type of the computation; master weights are always float32. auto: bfloat16 on GPUs, else float32.",
    )


class CheckpointConfig(Section):
    save_contents: Annotated[list[Literal["model", "optimizer", "extra", "hf_model"]], NO_CHECKPOINT, ALWAYS_WHOLE] = (
        Field(
            ["model", "optimizer", "extra"],
            description="Contents of a checkpoint; extra: schedule and counters; hf_model: also a Hugging Face export.",
        )
    )
