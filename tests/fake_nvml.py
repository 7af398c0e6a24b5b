"""A driver for tests: replaces the functions of ``pynvml`` that verl calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import pynvml
import pytest

MB = 1 << 20


def install(
    monkeypatch: pytest.MonkeyPatch,
    gpus: Sequence[tuple[str, int, int] | str],
    processes: Mapping[str, Sequence[tuple[int, int | None]] | None] | None = None,
    names: Mapping[int, str] | None = None,
) -> None:
    """gpus: (UUID, free MB, total MB), or only the UUID of one whose memory cannot be read.
    processes: by UUID, (pid, MB or None if hidden); None instead of a list if the driver refuses to list them.
    names: by pid; the driver does not know others.
    """

    def memory(handle: int) -> SimpleNamespace:
        gpu = gpus[handle]
        if isinstance(gpu, str):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(free=gpu[1] * MB, total=gpu[2] * MB)

    def uuid(handle: int) -> str:
        gpu = gpus[handle]
        return gpu if isinstance(gpu, str) else gpu[0]

    def running(handle: int) -> list[SimpleNamespace]:
        listed = (processes or {}).get(uuid(handle), ())
        if listed is None:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        return [SimpleNamespace(pid=pid, usedGpuMemory=held and held * MB) for pid, held in listed]

    def name(pid: int) -> str:
        if pid not in (names or {}):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return (names or {})[pid]

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(gpus))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda index: index)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUUID", uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", running)
    monkeypatch.setattr(pynvml, "nvmlSystemGetProcessName", name)


def remove(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a driver."""

    def missing() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", missing)
