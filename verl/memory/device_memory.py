"""Peak GPU memory of this process: since its start, and since a piece of work began."""

from __future__ import annotations

import weakref
from typing import ClassVar

import torch

SPARE = 4 << 30  # bytes of a device that stay free when tensors are kept there because they fit
_before = {"allocated": 0, "reserved": 0}  # peaks before torch's counters were last reset


def peaks(device: torch.device) -> dict[str, int]:
    """Peak bytes since the process started: ``allocated`` by tensors and ``reserved`` by torch's allocator."""
    now = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: max(_before[name], now[name]) for name in now}


class Peak:
    """Peak bytes of tensors since this object was created. Several may overlap."""

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
