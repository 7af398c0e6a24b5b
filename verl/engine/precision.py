"""What the optimizer steps: float32 masters, whatever the forward computes in.

float32, and sharded models in any precision (FSDP2 keeps float32 shards and casts on gathering): the parameters are
their own masters. bfloat16 in one process: the parameters are bfloat16, and a separate float32 copy is stepped. Then
each micro-batch's bfloat16 gradient is added to the master's float32 gradient as soon as it is whole, and freed, so
that summing many micro-batches, and steps smaller than bfloat16 resolves, are not rounded away.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from verl.machine import resolve_dtype

if TYPE_CHECKING:
    from verl.config.sections.base import DType


def compute_dtype(name: DType, device: torch.device) -> torch.dtype:
    """Of a config's ``dtype``: auto is float32 on a CPU and bfloat16 elsewhere."""
    return getattr(torch, resolve_dtype(name, device.type))


class MasterWeights:
    """by_name: the masters under the module's parameter names (tied parameters once). home: where separate ones live.
    separate: whether the parameters are others."""

    def __init__(
        self, module: nn.Module, compute_dtype: torch.dtype, sharded: bool, device: torch.device, home: torch.device
    ):
        """module: its parameters float32; in one process they become ``compute_dtype`` here, and go to ``device``."""
        self.params = dict(module.named_parameters())
        self.separate = compute_dtype != torch.float32 and not sharded
        self._sums: dict[str, torch.Tensor] = {}  # gradients of separate masters
        if not self.separate:
            self.by_name: dict[str, torch.Tensor] = dict(self.params)
            return
        self.by_name = {name: param.detach().to(home) for name, param in self.params.items()}
        for name, param in self.params.items():
            param.data = param.data.to(device, compute_dtype)
            param.register_post_accumulate_grad_hook(partial(self._add_gradient, name))

    def _add_gradient(self, name: str, param: torch.Tensor) -> None:
        assert param.grad is not None
        if name in self._sums:
            self._sums[name].add_(param.grad)
        else:
            self._sums[name] = param.grad.float()
        param.grad = None

    def gradients(self) -> dict[str, torch.Tensor]:
        """Accumulated since the last ``drop_gradients``, float32, on the device, of the parameters that have any."""
        if self.separate:
            return self._sums
        return {name: param.grad for name, param in self.params.items() if param.grad is not None}

    def drop_gradients(self) -> None:
        self._sums.clear()
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def copy_to_params(self, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """The masters' values become the parameters' (after a step or a load). values: what some of them hold."""
        if self.separate:
            for name, master in (self.by_name if values is None else values).items():
                self.params[name].copy_(master)
