"""Memory that two processes see: CUDA memory through IPC handles, host memory through anonymous files.

A buffer is a flat uint8 tensor. Its handle, sent over an authenticated connection, opens the same bytes elsewhere.
An anonymous file has no name that anyone would have to remove, is there only while somebody has it open or mapped,
and does not count as part of /dev/shm, which is small in containers.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

ALIGNMENT = 16  # bytes: every dtype's view starts on one


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a buffer, in bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    offset: int

    def view(self, buffer: torch.Tensor) -> torch.Tensor:
        dtype = getattr(torch, self.dtype)
        count = 1
        for length in self.shape:
            count *= length
        return buffer[self.offset : self.offset + count * dtype.itemsize].view(dtype).view(self.shape)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class SharedBuffer:
    """``size`` bytes on ``device`` that other processes may open by ``handle``."""

    def __init__(self, size: int, device: torch.device):
        self._descriptor: int | None = None
        if device.type == "cuda":
            self.tensor = torch.empty(size, dtype=torch.uint8, device=device)
            self.handle: Any = share_cuda(self.tensor)
            return
        self._descriptor = os.memfd_create("verl-weights")
        try:
            os.ftruncate(self._descriptor, size)  # takes memory as it is filled, like any tensor
            self.tensor = _mapped(self._descriptor, size)
        except OSError as error:
            self.forget()
            raise OSError(error.errno, f"{size >> 20} MiB of memory for weight buckets: {error.strerror}") from error
        self.handle = ("file", f"/proc/{os.getpid()}/fd/{self._descriptor}", size)

    def forget(self) -> None:
        """Receivers have opened it, or never will."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def opened(handle: Sequence[Any]) -> torch.Tensor:
    """The same bytes as the buffer that the handle is of."""
    kind, *rest = handle
    if kind == "file":
        path, size = rest
        descriptor = os.open(path, os.O_RDWR)
        try:
            return _mapped(descriptor, size)
        finally:
            os.close(descriptor)
    rebuild, arguments = rest
    return rebuild(*_here(arguments))


def _here(arguments: Sequence[Any]) -> Sequence[Any]:
    """Of ``rebuild_cuda_tensor``, with the device as this process counts it: it is the one that it works on, as sender
    and receiver share a GPU, while each may see others, too."""
    return (*arguments[:6], torch.cuda.current_device(), *arguments[7:])


def share_cuda(tensor: torch.Tensor) -> tuple[str, Any, Any]:
    """A handle to a CUDA tensor of this process, which has to live until the others have dropped it."""
    from torch.multiprocessing.reductions import reduce_tensor

    return ("cuda", *reduce_tensor(tensor))


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
