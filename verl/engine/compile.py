"""Decoder layers compiled by torch, one at a time, for the engine's own forwards and backwards only."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch._inductor.config
import torch.nn.attention.varlen  # defines torch.ops.torch_attn
import transformers
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from transformers.modeling_layers import GradientCheckpointingLayer

# Code is compiled once for all layers, but anew for each model, with and without gradient, packed and not.
VARIANTS = 64
PLAIN: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # no layer draws numbers: dropout is off
ATTENTION = (
    torch.ops.torch_attn._varlen_attn.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


def compiled_so_far() -> tuple[int, float]:
    """Graphs that this process has compiled, and the seconds that this took."""
    utils = torch._dynamo.utils
    seconds = sum(utils.compilation_time_metrics.get("_compile.compile_inner", ()))
    return utils.counters["stats"]["unique_graphs"], seconds


class CompiledLayers:
    """What transformers calls a layer (``_no_split_modules``): small models are no longer held up by their launches,
    large ones no longer by the memory traffic between matrix products.

    recomputing: those of the layers that are checkpointed here: their backward computes the layer again.
    """

    def __init__(self, hf: transformers.PreTrainedModel, checkpointing: bool = False):
        """checkpointing: the layers that can be checkpointed are."""
        names = set(hf._no_split_modules or ())  # of classes, of which sharding makes subclasses
        layers = [module for module in hf.modules() if names & {each.__name__ for each in type(module).__mro__}]
        for module in (module for layer in layers for module in layer.modules()):
            # Dynamo takes numbers of modules so marked, like the size of a head, for inputs that may change, and where
            # in a tensor an element lies is then found by dividing by them. What is compiled is inside FSDP's hooks.
            module._is_fsdp_managed_module = False  # type: ignore[assignment]
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]
        self.recomputing = {each for each in layers if checkpointing and isinstance(each, GradientCheckpointingLayer)}
        recomputed = Recomputed()
        self._updating = [
            (layer, partial(recomputed, layer, forward) if layer in self.recomputing else forward)
            for layer, forward in self._forwards
        ]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        # Else Inductor makes one code for micro-batches that are large enough to fuse the norms' sums over tokens, and
        # another for smaller ones, in whichever step the first of those comes: 4 s with 0.5B on an H200.
        torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
        torch._dynamo.config.specialize_float = True  # else a norm's epsilon is an input, and has a kernel on the CPU
        if checkpointing:  # else: a warning of operations in place, which none has on what its attention gives
            logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    @contextmanager
    def __call__(self, updating: bool = False) -> Iterator[None]:
        """Inside, the layers run compiled code, hooks around it as ever. updating: with a backward, around which this
        has to be, too."""
        for layer, forward in self._updating if updating else self._forwards:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward  # the class's own again


class Recomputed:
    """A layer's forward whose backward computes it again inside compiled code, from its input and what its attention
    gave, as far as gradients need it: not the last matrix product. A class of layers that cannot be compiled as a whole
    is computed again as a whole, in the pieces that can be.
    """

    def __init__(self) -> None:
        self._in_pieces: set[type] = set()
        self._inside = torch.compile(_recomputed, dynamic=True, fullgraph=True)

    def __call__(self, layer: Any, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if type(layer) not in self._in_pieces:
            try:
                return self._inside(layer, *args, **kwargs)
            except TorchDynamoException as error:
                self._in_pieces.add(type(layer))
                name, why = type(layer).__name__, str(error).partition("\n")[0]
                warnings.warn(f"{name} cannot be compiled as a whole, which would be faster: {why}", stacklevel=2)
        return checkpoint(compiled, *args, **PLAIN, **kwargs)


def _recomputed(layer: Any, *args: Any, **kwargs: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(layer).forward(layer, *args, **kwargs)

    return checkpoint(
        forward, *args, context_fn=partial(create_selective_checkpoint_contexts, _kept), **PLAIN, **kwargs
    )


def _kept(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE
