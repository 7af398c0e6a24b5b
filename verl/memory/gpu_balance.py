"""Whether the GPUs of one tensor-parallel engine have equal free memory, told before the engine starts.

SGLang sizes every rank by the fullest GPU of the group, and refuses to start when that one has less than 0.9 of the
free memory of another. A run starts its engines where that holds; this module looks whether it does, and names the
process that is in the way when it does not. nvidia-smi tells: a CUDA context here would itself take memory.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from verl.errors import UserError

DISABLE, ENABLE = "SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", "SGLANG_ENABLE_TP_MEMORY_INBALANCE_CHECK"

# Each variable that users set, and the value of it that asks for no check.
NO_CHECK = {DISABLE: True, "SGLANG_DISABLE_TP_MEMORY_INBALANCE_CHECK": True, ENABLE: False}
YES, NO = ("true", "1", "yes", "y"), ("false", "0", "no", "n")

NO_MORE_GPUS = ("", "-1", "NoDevFiles")  # what ends CUDA_VISIBLE_DEVICES


@dataclass(frozen=True)
class GPUProcess:
    """A process that holds memory of a GPU. None: not visible from here, as often in a container."""

    pid: int | None
    name: str | None
    megabytes: int | None

    def __str__(self) -> str:
        pid = "a process whose pid is not visible from here" if self.pid is None else f"pid {self.pid}"
        name = "name not visible from here" if self.name is None else self.name
        held = "how much is not visible from here" if self.megabytes is None else _mb(self.megabytes)
        return f"{pid} ({name}): {held}"


@dataclass(frozen=True)
class GPUReading:
    """Memory of one GPU, in nvidia-smi's MB (2^20 bytes). ``index`` is nvidia-smi's number, or a caller's own name for
    it (with the node's, in a group over several)."""

    index: int | str
    free_mb: int
    total_mb: int
    processes: tuple[GPUProcess, ...] = ()


def read_gpus(indices: Sequence[int] | None, chosen: str | None = None) -> list[GPUReading]:
    """The GPUs at these positions among those that CUDA_VISIBLE_DEVICES shows this process, in that order; None: all.
    chosen: takes the variable's place.

    Empty where nvidia-smi does not answer, and on slices of a GPU (MIG), whose memory it does not list. Numbers are
    nvidia-smi's, by PCI bus; on a machine with GPUs of several models CUDA agrees with them under
    CUDA_DEVICE_ORDER=PCI_BUS_ID. Raises UserError for a GPU that is not there.
    """
    processes = _processes()
    installed = {
        uuid: GPUReading(int(index), int(free), int(total), processes.get(uuid, ()))
        for index, uuid, free, total in _nvidia_smi("gpu=index,uuid,memory.free,memory.total")
        if free.isdigit() and total.isdigit()
    }
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES") if chosen is None else chosen
    if not installed or (chosen or "").startswith("MIG-"):
        return []
    visible = list(installed.values()) if chosen is None else _visible(installed, chosen)
    if indices is None:
        return visible
    for index in indices:
        if not 0 <= index < len(visible):
            shown = "nvidia-smi lists" if chosen is None else f"CUDA_VISIBLE_DEVICES={chosen} shows"
            raise UserError(
                f"An engine is to start on GPU {index}, counted from 0, and {shown} {len(visible)}. "
                "Ask for fewer GPUs, or make more of them visible."
            )
    return [visible[index] for index in indices]


def _visible(installed: Mapping[str, GPUReading], chosen: str) -> list[GPUReading]:
    """installed: by UUID. chosen: CUDA_VISIBLE_DEVICES, with numbers or (beginnings of) UUIDs."""
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


def _processes() -> dict[str, tuple[GPUProcess, ...]]:
    """By the GPU's UUID, the largest first."""
    found: dict[str, list[GPUProcess]] = {}
    for uuid, pid, held, name in _nvidia_smi("compute-apps=gpu_uuid,pid,used_memory,process_name"):
        process = GPUProcess(_number(pid), None if name.startswith("[") else name, _number(held))
        found.setdefault(uuid, []).append(process)
    return {uuid: tuple(sorted(on_gpu, key=lambda p: -(p.megabytes or 0))) for uuid, on_gpu in found.items()}


def _nvidia_smi(query: str) -> list[list[str]]:
    """Rows of the answer, by the query's columns; none where there is no driver, or it does not answer."""
    command = ["nvidia-smi", f"--query-{query}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    commas = query.count(",")
    rows = [[field.strip() for field in line.split(",", commas)] for line in answer.splitlines()]
    return [row for row in rows if len(row) == commas + 1]


def _number(text: str) -> int | None:
    """None for what nvidia-smi does not know: [N/A], [Not Found], [Insufficient Permissions]."""
    return int(text) if text.isdigit() else None


def check_balance(readings: Sequence[GPUReading], *, tolerance: float = 0.95, disabled: bool) -> str | None:
    """None when every GPU of a replica has at least ``tolerance`` of the free memory of the one that has most.

    Otherwise UserError, or the same facts as a warning's text when the user has disabled the check. SGLang compares by
    0.9 a little later, with its own processes already there: the default leaves room for that.
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
    """What holds the memory that this GPU lacks, one a line."""
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
    """Whether the user's variables ask for no check, each taken by its name's sense, whatever this SGLang makes of it.

    environ: as the user set it. Importing sglang rewrites os.environ and would make the user contradict themselves.
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
    """The whole environment of an engine's process: ``environ``, with what the user said about the check under the one
    name that SGLang reads since 0.5.7. The old names go: some of its versions take them for the opposite."""
    kept = {name: value for name, value in environ.items() if name not in NO_CHECK}
    return kept | {ENABLE: "0" if disabled_by_user(environ) else "1"}
