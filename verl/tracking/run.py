"""The run, as its trackers know it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunInfo:
    """folder: where the run leaves its files. config: the resolved configuration, as plain data. total_steps: the last
    step's number. resume_step: the last step that the run goes on from, which is done; None for a run from the start.
    """

    project: str
    experiment: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    resume_step: int | None = None
