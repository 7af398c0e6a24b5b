"""Moving an engine's tensors between the device and the host, in place. On the host they are pinned."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def move_tensors(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Each tensor keeps its identity and gets storage on ``device``."""
    for tensor in tensors:
        if isinstance(tensor, DTensor):
            tensor._local_tensor = _moved(tensor._local_tensor, device)
        else:
            tensor.data = _moved(tensor.data, device)


def move_module(module: nn.Module, device: torch.device) -> None:
    """Parameters, sharded or not, and buffers. ``_apply`` is what ``Module.to`` calls: there FSDP learns where its
    shards are now."""
    with torch.no_grad():
        module._apply(lambda tensor: _moved(tensor, device))


def _moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    if tensor.device.type == device.type:
        return tensor
    if device.type != "cpu":
        return tensor.to(device)
    if isinstance(tensor, DTensor):  # Tensor.to would leave it unpinned, and DTensor.from_local on the device
        host = cast(DTensor, torch.empty_like(tensor, device=device))
        host._local_tensor = _moved(tensor._local_tensor, device)
        return host
    return torch.empty_like(tensor, device=device, pin_memory=True).copy_(tensor)
