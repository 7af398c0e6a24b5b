"""All loggers of a run (``trainer.logger``) behind one object."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from verl.errors import UserError
from verl.tracking.backends import Backend, JsonlBackend, TensorBoardBackend
from verl.tracking.dumps import DumpFormat, dump_rows
from verl.tracking.progress import Progress
from verl.tracking.run import RunInfo
from verl.tracking.services import SERVICES, missing_package

BACKENDS: dict[str, Callable[[RunInfo], Backend]] = {
    "file": JsonlBackend,
    "tensorboard": TensorBoardBackend,
    **SERVICES,
}
LOGGERS = ("console", *BACKENDS)


class Trackers:
    """Sends metrics and samples to every backend and to the console.

    A failing backend does not stop the run: the first failure is printed, and every later call tries again."""

    def __init__(self, backends: dict[str, Backend], progress: Progress):
        self.progress = progress
        self._backends = backends
        self._reported: set[str] = set()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log the metrics of a step. metrics: name -> number (Python, numpy, or a tensor with one element)."""
        numbers = {name: float(value) for name, value in metrics.items()}
        for name, backend in self._backends.items():
            self._try(f"logger {name!r}", partial(backend.log, numbers, step))
        self.progress.step(step, numbers)

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Log a few generations (``verl.tracking.dumps.generation_rows``)."""
        for name, backend in self._backends.items():
            self._try(f"logger {name!r}", partial(backend.log_samples, rows, step))
        self.progress.samples(rows, step)

    def dump(
        self, folder: Path, step: int, rows: pa.Table | Sequence[Mapping[str, Any]], file_format: DumpFormat = "jsonl"
    ) -> None:
        """Write generations to a file, see ``verl.tracking.dumps.dump_rows``."""
        self._try(f"the dump to {folder}", partial(dump_rows, folder, step, rows, file_format))

    def close(self) -> None:
        for name, backend in self._backends.items():
            self._try(f"logger {name!r}", backend.close)
        self._backends = {}

    def __enter__(self) -> Trackers:
        self.progress.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        try:
            self.close()
        finally:
            self.progress.__exit__(*exception)

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:  # a logger's library may raise anything, and must not stop the run
            if what not in self._reported:
                self._reported.add(what)
                self.progress.warn(f"{what} failed ({error or type(error).__name__}); the run continues")


def build_trackers(names: Sequence[str], run: RunInfo) -> Trackers:
    """The started loggers. Without "console" only notes and warnings are printed.

    Raises UserError that names all unknown loggers, all loggers whose package is missing, or the one that cannot start.
    """
    unknown = [name for name in names if name not in LOGGERS]
    if unknown:
        raise UserError("; ".join(_unknown(name) for name in unknown) + f". Known loggers: {', '.join(LOGGERS)}")
    if missing := [name for name in names if missing_package(name)]:
        raise UserError("; ".join(f"trainer.logger: {name!r}: {how_to_install(name)}" for name in missing))
    progress = Progress(run, show="console" in names)
    trackers = Trackers({}, progress)
    for name in dict.fromkeys(names):
        if name == "console":
            continue
        try:
            trackers._backends[name] = BACKENDS[name](run)
        except Exception as error:  # the library may raise anything; the user needs the logger's name
            trackers.close()
            raise UserError(
                f"trainer.logger: {name!r} cannot start ({error or type(error).__name__}). "
                f"Correct this, or remove it from trainer.logger={list(names)}"
            ) from error
    return trackers


def how_to_install(name: str) -> str:
    return f'its package is not installed; run pip install "verl[{name}]" (in a checkout: pip install -e ".[{name}]")'


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, LOGGERS, 1)
    return f"trainer.logger: {name!r} is not a logger" + (f" (did you mean {near[0]!r}?)" if near else "")
