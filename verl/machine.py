"""What this machine offers, told without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

if TYPE_CHECKING:
    from verl.config.sections.base import DType


def installed_gpus() -> int:
    """NVIDIA GPUs that this process may use, as the driver and CUDA_VISIBLE_DEVICES say."""
    if not shutil.which("nvidia-smi"):
        return 0
    try:
        listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    installed = sum(line.startswith("GPU ") for line in listing.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return installed
    return min(installed, len([name for name in chosen.split(",") if name.strip() not in ("", "-1")]))


def torch_is_cpu_build() -> bool:
    return importlib.metadata.version("torch").endswith("+cpu")


def resolve_device(asked: Literal["auto", "cpu", "cuda"], world_size: int, gpus: int) -> Literal["cpu", "cuda"]:
    """The device kind, cpu or cuda. ``auto``: cuda where there is a GPU, and for a job of several devices anyway."""
    if asked != "auto":
        return asked
    return "cuda" if gpus or world_size > 1 else "cpu"


def resolve_dtype(asked: DType, device: str) -> Literal["float32", "bfloat16"]:
    """Of the computation. device: its kind."""
    if asked != "auto":
        return asked
    return "float32" if device == "cpu" else "bfloat16"


@dataclass(frozen=True)
class HostMemory:
    """Bytes: that this process may have without anybody's being swapped out, and in all. limited: by a cgroup (a
    container's, or a job's), and not by the machine."""

    available: int
    total: int
    limited: bool = False


def host_memory(cgroups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> HostMemory:
    """What is free of the machine, or of the limit on this process, whichever is less.

    cgroups: where they are mounted. own: the file that names those of this process.
    """
    machine = psutil.virtual_memory()
    found = HostMemory(machine.available, machine.total)
    for limit, used in _limits(cgroups, own):
        if limit < machine.total and limit - used < found.available:
            found = HostMemory(max(limit - used, 0), limit, limited=True)
    return found


def _limits(cgroups: Path, own: Path) -> Iterator[tuple[int, int]]:
    """Limit and use of each cgroup that this process is in, up to the outermost. Files that the kernel caches are not
    used: it drops them when memory is asked for."""
    for base, path in _memory_cgroups(cgroups, own):
        if base == cgroups:
            names, prefix = ("memory.max", "memory.current"), ""
        else:
            names, prefix = ("memory.limit_in_bytes", "memory.usage_in_bytes"), "total_"
        inside = base / path if (base / path).is_dir() else base  # a container sees its own as the outermost
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(base):
                break
            try:
                limit, used = (int((folder / name).read_text()) for name in names)
                fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(fields[f"{prefix}{kind}_file"]) for kind in ("inactive", "active"))
            except (OSError, ValueError, KeyError):  # the outermost has no limit; "max" is none
                continue
            yield limit, used - cached


def _memory_cgroups(cgroups: Path, own: Path) -> Iterator[tuple[Path, str]]:
    """Where they are, and this process's path from there: of version 2, and of version 1's memory controller."""
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
