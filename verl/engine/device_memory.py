"""How much of a GPU's memory this process has taken at most: in all, and within one piece of work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_before = {"allocated": 0, "reserved": 0}  # until the last piece of work began


def peaks(device: torch.device) -> dict[str, int]:
    """``allocated`` and ``reserved`` (by torch's allocator, for tensors to come as well): bytes, since it started."""
    now = {"allocated": torch.cuda.max_memory_allocated(device), "reserved": torch.cuda.max_memory_reserved(device)}
    return {name: max(_before[name], now[name]) for name in now}


@contextmanager
def peak_within(device: torch.device) -> Iterator[Callable[[], int]]:
    """Gives what tells the bytes allocated at most since: 0 on a CPU."""
    if device.type != "cuda":
        yield lambda: 0
        return
    _before.update(peaks(device))
    torch.cuda.reset_peak_memory_stats(device)
    yield lambda: torch.cuda.max_memory_allocated(device)
