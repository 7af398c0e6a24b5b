"""Decoder layers compiled by torch, one at a time, for the engine's own forwards and backwards only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers

# Code is compiled once for all layers, but anew for each model, with and without gradient, packed and not.
VARIANTS = 64


class CompiledLayers:
    """What transformers calls a layer (``_no_split_modules``): small models are no longer held up by their launches,
    large ones no longer by the memory traffic between matrix products."""

    def __init__(self, hf: transformers.PreTrainedModel):
        names = set(hf._no_split_modules or ())  # of classes, of which sharding makes subclasses
        layers = [module for module in hf.modules() if names & {each.__name__ for each in type(module).__mro__}]
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=True)) for layer in layers]
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Inside, the layers run compiled code, hooks around it as ever. Around a backward too, which may run layers
        again."""
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward  # the class's own again
