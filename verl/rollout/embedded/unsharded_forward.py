"""Forwards of a module whose weights FSDP may have sharded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method

from verl.rollout.contract.base import IllegalState

_METHOD = "rollout_forward"


class UnshardedForward:
    """``forward(**kwargs)`` of a causal LM that answers with its logits.

    root: ``module`` or a module that contains it, the outermost that ``fully_shard`` was applied to (if it was).
    reshard_after_forward: what the modules inside the root were given.
    """

    def __init__(self, module: torch.nn.Module, root: torch.nn.Module, reshard_after_forward: bool):
        self._module, self._reshard_after_forward = module, reshard_after_forward
        self._sharded = [part for part in root.modules() if isinstance(part, FSDPModule)]
        self._whole = not self._sharded
        self._call = self._logits
        if isinstance(root, FSDPModule):
            # A forward through the inner module alone would make FSDP take its first layer for the root.
            setattr(root, _METHOD, self._logits)
            register_fsdp_forward_method(root, _METHOD)
            self._call = getattr(root, _METHOD)

    def __call__(self, **kwargs: Any) -> torch.Tensor:
        if not self._whole:
            raise IllegalState("generate: the weights are sharded; generate within `with engine.whole_weights():`")
        return self._call(**kwargs)

    def _logits(self, **kwargs: Any) -> torch.Tensor:
        return self._module(**kwargs).logits

    @contextmanager
    def unsharded(self) -> Iterator[None]:
        """Within this every rank has the whole weights. A collective on entry, none afterwards."""
        if not self._sharded:
            yield
            return
        root = self._sharded[0]
        root.set_reshard_after_forward(False)
        try:
            for part in self._sharded:
                part.unshard()
            self._whole = True
            yield
        finally:
            self._whole = False
            for part in self._sharded:
                part.reshard()
            # The root's own weights, which backward needs at once, FSDP never reshards after a forward.
            root.set_reshard_after_forward(self._reshard_after_forward)
            root.set_reshard_after_forward(False, recurse=False)
