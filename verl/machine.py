"""The GPUs and the host memory of this machine, read without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil
import pynvml

if TYPE_CHECKING:
    from verl.config.sections.base import DType


@contextmanager
def nvidia_driver() -> Iterator[int]:
    """Yields the number of GPUs that the NVIDIA driver lists; 0 without a driver, or if it does not answer.

    NVML calls are allowed inside. NVML creates no CUDA context, so it takes no memory of a GPU.
    """
    with ExitStack() as stack:
        try:
            pynvml.nvmlInit()
            stack.callback(pynvml.nvmlShutdown)
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError:
            count = 0
        yield count


def installed_gpus() -> int:
    """The number of NVIDIA GPUs that this process may use: those of the driver that CUDA_VISIBLE_DEVICES shows."""
    with nvidia_driver() as installed:
        pass
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    return min(installed, len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))


def torch_is_cpu_build() -> bool:
    return importlib.metadata.version("torch").endswith("+cpu")


def resolve_device(asked: Literal["auto", "cpu", "cuda"], world_size: int, gpus: int) -> Literal["cpu", "cuda"]:
    """The device kind. ``auto`` is cuda if there is a GPU or if the job has several devices, else cpu."""
    if asked != "auto":
        return asked
    return "cuda" if gpus or world_size > 1 else "cpu"


def resolve_dtype(asked: DType, device: str) -> Literal["float32", "bfloat16"]:
    """The dtype of the computation. ``auto`` is float32 on ``device`` cpu, else bfloat16."""
    if asked != "auto":
        return asked
    return "float32" if device == "cpu" else "bfloat16"


@dataclass(frozen=True)
class HostMemory:
    """Host memory in bytes.

    available: memory that this process can take without swapping.
    total: all memory that it could ever have.
    limited: whether a cgroup (of a container or a job) sets the limit, and not the machine.
    """

    available: int
    total: int
    limited: bool = False


def host_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> HostMemory:
    """The memory that is free on the machine or under the limit of a cgroup of this process, whichever is less.

    cgroups: the folder in which they are mounted.
    own: the file that names the cgroups of this process.
    """
    machine = psutil.virtual_memory()
    found = HostMemory(machine.available, machine.total)
    for limit, used in _limits(cgroups, own):
        if limit < machine.total and limit - used < found.available:
            found = HostMemory(max(limit - used, 0), limit, limited=True)
    return found


def _limits(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each cgroup of this process, up to the outermost. The page cache does not count as use: the
    kernel drops it when memory is needed."""
    for base, path in _memory_cgroups(cgroups, own):
        if base == cgroups:
            names, prefix = ("memory.max", "memory.current"), ""
        else:
            names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        inside = base / path if (base / path).is_dir() else base  # in a container, its own is the outermost
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(base):
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(fields[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
            except (OSError, ValueError, KeyError):  # the outermost has no files; "max" is no limit
                continue
            yield limit, used - cached


def _memory_cgroups(cgroups: Path, own: Path) -> Iterator[tuple[Path, str]]:
    """(mount point, path below it) of the cgroups of this process: version 2, and version 1's memory controller."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if number == "0":
            yield cgroups, path.lstrip("/")
        elif "memory" in controllers.split(","):
            yield cgroups / "memory", path.lstrip("/")
