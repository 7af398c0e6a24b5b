"""What the optimizer steps: float32 masters, whatever the forward computes in.

float32, and sharded models in any precision (FSDP2 keeps float32 shards and casts on gathering): the parameters are
their own masters. bfloat16 in one process: the parameters are bfloat16, and a separate float32 copy is stepped. Then
each micro-batch's bfloat16 gradient is added to the master's float32 gradient as soon as it is whole, and freed, so
that summing many micro-batches, and steps smaller than bfloat16 resolves, are not rounded away.
"""

from __future__ import annotations

import torch
from torch import nn


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of a config's ``dtype``: auto is float32 on a CPU and bfloat16 elsewhere."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


class Masters:
    """Names are the module's parameter names (tied parameters once)."""

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype, sharded: bool):
        """module: its parameters float32; in one process they become ``compute_dtype`` here."""
        self.params = dict(module.named_parameters())
        self.separate = compute_dtype != torch.float32 and not sharded
        self.by_name = {name: self._split(param, compute_dtype) for name, param in self.params.items()}

    def _split(self, param: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
        if not self.separate:
            return param
        master = nn.Parameter(param.detach().clone())
        param.data = param.data.to(dtype)

        def add_gradient(param: torch.Tensor) -> None:
            assert param.grad is not None
            if master.grad is None:
                master.grad = param.grad.to(master.dtype)
            else:
                master.grad.add_(param.grad)
            param.grad = None

        param.register_post_accumulate_grad_hook(add_gradient)
        return master

    @torch.no_grad()
    def publish(self) -> None:
        """The masters' values become the parameters' (after a step or a load)."""
        if self.separate:
            for name, master in self.by_name.items():
                self.params[name].copy_(master)
