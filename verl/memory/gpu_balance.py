"""Checks, before a tensor-parallel engine starts, that its GPUs have equal free memory.

SGLang sizes every rank by the fullest GPU of the group. It refuses to start if that GPU has less than 0.9 of the free
memory of another. The check names the GPU, the difference and the process that holds the memory. It reads them through
NVML, because a CUDA context would itself take memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pynvml

from verl.errors import UserError
from verl.machine import nvidia_driver

DISABLE, ENABLE = "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"

# Each variable that users set, and the value that switches the check off.
NO_CHECK = {DISABLE: True, "SGLANG_DISABLE_TP_MEMORY_INBALANCE_CHECK": True, ENABLE: False}
YES, NO = ("true", "1", "yes", "y"), ("false", "0", "no", "n")

NO_MORE_GPUS = ("", "-1", "NoDevFiles")  # entries that end CUDA_VISIBLE_DEVICES
MB = 1 << 20  # as in nvidia-smi


@dataclass(frozen=True)
class GPUProcess:
    """A process that holds memory of a GPU. None: not visible from here, often because this is a container."""

    pid: int
    name: str | None
    megabytes: int | None

    def __str__(self) -> str:
        name = "name not visible from here" if self.name is None else self.name
        held = "how much is not visible from here" if self.megabytes is None else _mb(self.megabytes)
        return f"pid {self.pid} ({name}): {held}"


@dataclass(frozen=True)
class GPUReading:
    """Memory of one GPU in MB of 2^20 bytes.

    index: the driver's number, as in nvidia-smi, or the caller's own name (with the node's, in a group over several).
    processes: those that hold its memory, the largest first.
    """

    index: int | str
    free_mb: int
    total_mb: int
    processes: tuple[GPUProcess, ...] = ()


def read_gpus(indices: Sequence[int] | None, chosen: str | None = None) -> list[GPUReading]:
    """The GPUs at these positions among those that CUDA_VISIBLE_DEVICES shows, in that order.

    Empty without a driver and for slices of a GPU (MIG), which the driver lists under their whole GPU.

    indices: None takes all of them.
    chosen: a value that takes the place of CUDA_VISIBLE_DEVICES.
    Numbers are the driver's, by PCI bus. On a machine with GPUs of several models CUDA uses the same numbers only under
    CUDA_DEVICE_ORDER=PCI_BUS_ID. Raises UserError for a GPU that does not exist.
    """
    installed = _installed()
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") if chosen is None else chosen
    if not installed or (chosen or "").startswith("MIG-"):
        return []
    visible = list(installed.values()) if chosen is None else _visible(installed, chosen)
    if indices is None:
        return visible
    for index in indices:
        if not 0 <= index < len(visible):
            shown = "the driver lists" if chosen is None else f"CUDA_VISIBLE_DEVICES={chosen} shows"
            raise UserError(
                f"An engine is to start on GPU {index}, counted from 0, and {shown} {len(visible)}. "
                "Ask for fewer GPUs, or make more of them visible."
            )
    return [visible[index] for index in indices]


def _visible(installed: Mapping[str, GPUReading], chosen: str) -> list[GPUReading]:
    """The GPUs that CUDA_VISIBLE_DEVICES (``chosen``: numbers, UUIDs or beginnings of UUIDs) names, in its order.

    installed: by UUID.
    """
    visible = []
    for entry in map(str.strip, chosen.split(",")):
        if entry in NO_MORE_GPUS:
            break
        matches = [
            gpu
            for uuid, gpu in installed.items()
            if entry == str(gpu.index) or (entry.startswith("GPU-") and uuid.startswith(entry))
        ]
        if len(matches) != 1:
            have = ", ".join(f"{gpu.index} ({uuid})" for uuid, gpu in installed.items())
            raise UserError(
                f"CUDA_VISIBLE_DEVICES={chosen}: {entry!r} names {'several GPUs' if matches else 'no GPU'} of this "
                f"machine. It has {have}; name those to use."
            )
        visible += matches
    return visible


def _installed() -> dict[str, GPUReading]:
    """By UUID, in the driver's order. A GPU whose memory cannot be read is left out."""
    found = {}
    with nvidia_driver() as count:
        for index in range(count):
            with suppress(pynvml.NVMLError):
                handle = pynvml.nvmlDeviceGetHandleByIndex(index)
                memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
                reading = GPUReading(index, memory.free // MB, memory.total // MB, _processes(handle))
                found[pynvml.nvmlDeviceGetUUID(handle)] = reading
    return found


def _processes(handle: Any) -> tuple[GPUProcess, ...]:
    """The processes that compute on a GPU, the largest first. Empty if this process may not list them."""
    try:
        running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
    except pynvml.NVMLError:
        return ()
    processes = [GPUProcess(each.pid, _process_name(each.pid), _megabytes(each.usedGpuMemory)) for each in running]
    return tuple(sorted(processes, key=lambda process: -(process.megabytes or 0)))


def _process_name(pid: int) -> str | None:
    try:
        return pynvml.nvmlSystemGetProcessName(pid) or None
    except pynvml.NVMLError:
        return None


def _megabytes(held: int | None) -> int | None:
    return None if held is None else held // MB


def check_balance(readings: Sequence[GPUReading], *, tolerance: float = 0.95, disabled: bool) -> str | None:
    """None if every GPU of a replica has at least ``tolerance`` of the free memory of the one that has most.

    Otherwise raises UserError, or returns the same facts as a warning if ``disabled``. SGLang compares by 0.9 a little
    later, when its own processes hold memory: the default leaves room for that.
    """
    if len(readings) < 2:
        return None
    freest = max(readings, key=lambda gpu: gpu.free_mb)
    least = min(readings, key=lambda gpu: gpu.free_mb)
    if least.free_mb >= tolerance * freest.free_mb:
        return None
    lines = [f"One engine is to run on GPUs {_names(readings)}, whose free memory differs by over {1 - tolerance:.0%}:"]
    for gpu in readings:
        lines.append(f"  {_name(gpu)}: {gpu.free_mb:,} of {_mb(gpu.total_mb)} free")
        if gpu.free_mb < tolerance * freest.free_mb:
            lines[-1] += f", {_mb(freest.free_mb - gpu.free_mb)} less than {_name(freest)}"
            lines += _holders(gpu, freest)
    if disabled:
        lines.append(
            f"The check is disabled: the engine starts, with as little memory on each GPU as on {_name(least)}."
        )
        return "\n".join(lines)
    lines += [
        f"It would get as little memory on each GPU as on {_name(least)}, and SGLang refuses a difference of over 10%.",
        "Stop what holds the memory, or name other GPUs in CUDA_VISIBLE_DEVICES. A trainer that was loaded before the",
        "engine has to offload its parameters and empty its cache first. To start the engine all the same:",
        f"  export {DISABLE}=True",
    ]
    raise UserError("\n".join(lines))


def _holders(gpu: GPUReading, freest: GPUReading) -> list[str]:
    """Lines that name the holders of the memory that this GPU lacks."""
    lines = [f"    held by {process}" for process in gpu.processes]
    missing = freest.free_mb - gpu.free_mb
    hidden = gpu.total_mb - gpu.free_mb - sum(process.megabytes or 0 for process in gpu.processes)
    if hidden >= missing / 2 and all(process.megabytes is not None for process in gpu.processes):
        lines += [
            f"    {_mb(hidden)} held by no process that is visible from here; outside of a container and as root,",
            "    nvidia-smi and `fuser -v /dev/nvidia*` show all of them",
        ]
    elif not gpu.processes:
        lines.append("    nothing much is held there: it is a smaller GPU")
    return lines


def _names(gpus: Sequence[GPUReading]) -> str:
    return ", ".join(str(gpu.index) for gpu in gpus)


def _name(gpu: GPUReading) -> str:
    return f"GPU {gpu.index}"


def _mb(megabytes: int) -> str:
    return f"{megabytes:,} MB"


def disabled_by_user(environ: Mapping[str, str]) -> bool:
    """Whether the user's variables switch the check off. Each variable means what its name says, whatever the installed
    SGLang makes of it.

    environ: the environment as the user set it. Importing sglang rewrites os.environ, which adds contradictions.
    Raises UserError for a value that is neither yes nor no, and for variables that contradict each other.
    """
    given = {name: environ[name].strip() for name in NO_CHECK if environ.get(name, "").strip()}
    disables = {name: _is_yes(name, value) == NO_CHECK[name] for name, value in given.items()}
    if len(set(disables.values())) > 1:
        off = ", ".join(f"{name}={given[name]}" for name in given if disables[name])
        on = ", ".join(f"{name}={given[name]}" for name in given if not disables[name])
        raise UserError(
            f"The environment switches the tensor-parallel memory check both off ({off}) and on ({on}). "
            "Unset the one that you do not mean."
        )
    return any(disables.values())


def _is_yes(name: str, value: str) -> bool:
    if value.lower() not in YES + NO:
        raise UserError(
            f"The environment variable {name} is {value!r}. It takes {', '.join(YES)} or {', '.join(NO)}; "
            f"{YES[0] if NO_CHECK[name] else NO[0]} switches the tensor-parallel memory check off."
        )
    return value.lower() in YES


def environment_for_engine(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of an engine's process: ``environ`` with the user's choice under the one name that SGLang reads
    since 0.5.7. The old names are removed, because some versions of SGLang read them as the opposite."""
    kept = {name: value for name, value in environ.items() if name not in NO_CHECK}
    return kept | {ENABLE: "0" if disabled_by_user(environ) else "1"}
