"""Loggers that store metrics, one class each. ``verl.tracking.trackers`` has the registry.

If a constructor raises, the run does not start. If ``log`` or ``close`` raises, the run continues.
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from verl.tracking.dumps import sample_text
from verl.tracking.files import AppendFile, written_whole
from verl.tracking.run import RunInfo


class Backend:
    def log(self, metrics: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        """Store samples, if the backend can show texts."""

    def close(self) -> None: ...


class JsonlBackend(Backend):
    """``metrics.jsonl``: one line per step: ``step``, then the metrics by name. Non-finite numbers are null.

    A resumed run removes the lines after ``run.resume_step``. The file then equals that of an uninterrupted run.
    """

    def __init__(self, run: RunInfo):
        path = run.folder / "metrics.jsonl"
        run.folder.mkdir(parents=True, exist_ok=True)
        if run.resume_step is not None:
            drop_later_lines(path, run.resume_step)
        elif path.exists() and path.stat().st_size:
            path.replace(run.folder / "metrics.previous.jsonl")
        self._file = AppendFile(path)

    def log(self, metrics: dict[str, float], step: int) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        self._file.append((json.dumps({"step": step, **finite}) + "\n").encode())

    def close(self) -> None:
        self._file.close()


def drop_later_lines(path: Path, step: int) -> None:
    """Keep only complete lines of steps up to ``step``."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if (number := _step_of(line)) is not None and number <= step]
    if kept != lines:
        with written_whole(path) as partial:
            partial.write_bytes(b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """The line's step, or None if the line is incomplete, as after a power failure."""
    if not line.endswith(b"\n"):
        return None
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None


class TensorBoardBackend(Backend):
    """Event files in ``tensorboard/``, one per start of the run.

    Tensorboard makes the records, and this class writes them. Tensorboard's own writer runs in a thread, where a full
    disk ends in a traceback. A session-start event makes tensorboard hide what an earlier start logged after
    ``run.resume_step``.
    """

    def __init__(self, run: RunInfo):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary, self._record_writer = Event, Summary, RecordWriter
        folder = run.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        self._file = AppendFile(folder / _event_file_name(folder))
        first_step = 0 if run.resume_step is None else run.resume_step + 1
        self._write(file_version="brain.Event:2")
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))
        self._write_text("config", yaml.safe_dump(run.config, sort_keys=False), first_step)

    def log(self, metrics: dict[str, float], step: int) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(step=step, summary=self._summary(value=values))

    def log_samples(self, rows: Sequence[Mapping[str, Any]], step: int) -> None:
        for number, row in enumerate(rows):
            self._write_text(f"samples/{number}", sample_text(row, step), step)

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields: Any) -> None:
        framed = io.BytesIO()
        event = self._event(wall_time=time.time(), **fields)
        self._record_writer(framed).write(event.SerializeToString())
        self._file.append(framed.getvalue())

    def _write_text(self, tag: str, text: str, step: int) -> None:
        """Write a text for tensorboard's text page. The page shows Markdown, so the text is an indented block."""
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.util.tensor_util import make_tensor_proto

        block = "\n".join(f"    {line}" for line in text.splitlines())
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        value = self._summary.Value(tag=tag, metadata=metadata, tensor=make_tensor_proto([block.encode()]))
        self._write(step=step, summary=self._summary(value=[value]))


def _event_file_name(folder: Path) -> str:
    """A name that sorts after all existing files. Tensorboard reads files in the order of their names."""
    earlier = [int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")]
    stamp = max([int(time.time()), *(number + 1 for number in earlier)])
    return f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
