"""Master weights: the float32 tensors that the optimizer updates, whatever dtype forwards have.

- float32 models, and sharded models of any dtype: the parameters are the master weights. FSDP2 keeps float32 shards and
  casts them when it gathers.
- bfloat16 in one process: the parameters are bfloat16, the master weights a separate float32 copy. Gradient
  accumulation is in float32: each micro-batch's bfloat16 gradient is added to a float32 sum and freed. So neither sums
  over many micro-batches nor steps below bfloat16's resolution are rounded away.
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
    """The dtype of forwards for a config's ``dtype``: auto is float32 on a CPU, else bfloat16."""
    return getattr(torch, resolve_dtype(name, device.type))


class MasterWeights:
    """The master weights of a module.

    by_name: master weights by parameter name; tied parameters once.
    separate: whether they are copies, and not the parameters themselves.
    """

    def __init__(
        self, module: nn.Module, compute_dtype: torch.dtype, sharded: bool, device: torch.device, home: torch.device
    ):
        """module: has float32 parameters. In one process they are cast to ``compute_dtype`` and moved to ``device``.
        home: the device of separate master weights.
        """
        self.params = dict(module.named_parameters())
        self.separate = compute_dtype != torch.float32 and not sharded
        self._sums: dict[str, torch.Tensor] = {}  # accumulated gradients of separate master weights
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
        """Gradients by name, accumulated since the last ``drop_gradients``: float32, on the device. Parameters without
        a gradient are left out."""
        if self.separate:
            return self._sums
        return {name: param.grad for name, param in self.params.items() if param.grad is not None}

    def drop_gradients(self) -> None:
        self._sums.clear()
        for param in self.params.values():
            param.grad = None

    @torch.no_grad()
    def copy_to_params(self, values: Mapping[str, torch.Tensor] | None = None) -> None:
        """Copies separate master weights into the parameters, after a step or a load.

        values: copies of some master weights on the device, by name; None for all master weights themselves.
        """
        if self.separate:
            for name, master in (self.by_name if values is None else values).items():
                self.params[name].copy_(master)
