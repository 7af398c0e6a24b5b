"""Compiles decoder layers with torch, one at a time, for the engine's own forwards and backwards only."""

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

# Compiled code is shared by all layers. Each model, with or without gradient, packed or padded, needs another variant.
VARIANTS = 64
PLAIN: dict[str, Any] = {
    "use_reentrant": False,
    "preserve_rng_state": False,
}  # dropout is off: nothing is random
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
    """Compiled forwards of the layers that transformers names in ``_no_split_modules``.

    Small models spend less time on kernel launches, large ones less on memory traffic between matrix products.

    recomputing: the layers with activation checkpointing, whose backward computes the layer again.
    """

    def __init__(self, hf: transformers.PreTrainedModel, checkpointing: bool = False):
        """checkpointing: whether to use activation checkpointing in all layers that support it."""
        names = set(hf._no_split_modules or ())  # names of classes; sharding makes subclasses of them
        layers = [module for module in hf.modules() if names & {each.__name__ for each in type(module).__mro__}]
        for module in (module for layer in layers for module in layer.modules()):
            # Dynamo treats the integers of marked modules, like a head size, as dynamic inputs, which makes index
            # arithmetic slow. The mark is not needed: compiled code is inside FSDP's hooks.
            module._is_fsdp_managed_module = False  # type: ignore[assignment]
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]
        self.recomputing = {each for each in layers if checkpointing and isinstance(each, GradientCheckpointingLayer)}
        recomputed = Recomputed()
        self._updating = [
            (layer, partial(recomputed, layer, forward) if layer in self.recomputing else forward)
            for layer, forward in self._forwards
        ]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
        # Without it, Inductor makes one code for micro-batches large enough to fuse the norms' sums over tokens, and
        # another for smaller ones, in the step in which the first of those comes: 4 s with 0.5B on an H200.
        torch._inductor.config.triton.mix_order_reduction_non_strict_mode = True
        torch._dynamo.config.specialize_float = True  # else a norm's epsilon is an input, computed by a CPU kernel
        if checkpointing:  # a warning about in-place operations, which no layer has on its attention's output
            logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)

    @contextmanager
    def __call__(self, updating: bool = False) -> Iterator[None]:
        """Inside, layers run compiled code; their hooks run as before.

        updating: whether a backward follows. It has to run inside, too.
        """
        for layer, forward in self._updating if updating else self._forwards:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward  # restores the class's forward


class Recomputed:
    """A layer's forward with activation checkpointing inside compiled code.

    The backward recomputes the layer from its input and the output of its attention, as far as gradients need it: the
    last matrix product is left out. If a class of layers cannot be compiled as a whole, the whole layer is recomputed
    in the pieces that compile.
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
