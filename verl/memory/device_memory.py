"""How much of a GPU's memory this process has taken at most: in all, and since a piece of work began."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch

SPARE = 4 << 30  # bytes of a device that stay free where something is left there because it fits
_before = {"allocated": 0, "reserved": 0}  # until torch's own counters began anew


def peaks(device: torch.device) -> dict[str, int]:
    """``allocated`` and ``reserved`` (by torch's allocator, for tensors to come as well): bytes, since it started."""
    now = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: max(_before[name], now[name]) for name in now}


class Peak:
    """The bytes that tensors took at most since this was made. One may begin while others go on."""

    _going_on: ClassVar[weakref.WeakSet[Peak]] = weakref.WeakSet()

    def __init__(self, device: torch.device):
        self._device, self._most = device, 0
        if device.type != "cuda":
            return
        _before.update(peaks(device))
        for other in self._going_on:
            other._most = other.bytes
        torch.cuda.reset_peak_memory_stats(device)
        self._going_on.add(self)

    @property
    def bytes(self) -> int:
        """0 on a CPU."""
        if self._device.type != "cuda":
            return 0
        return max(self._most, torch.cuda.max_memory_allocated(self._device))
