"""What this machine offers, told without importing torch."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
from typing import Literal


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
