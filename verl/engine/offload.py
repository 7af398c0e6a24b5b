"""Moving an engine's tensors between the device and the host, in place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def move_tensors(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Plain tensors: each keeps its identity and gets storage on ``device`` (pinned when that is the host)."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.data = moved(tensor.data, device)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Parameters, sharded or not, and buffers."""
    module._apply(lambda tensor: moved(tensor, device))


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device.type == device.type:
        return tensor
    if device.type == "cpu" and not isinstance(tensor, DTensor):
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor)
    return tensor.to(device)
