"""Facts about a run that its trackers use."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class RunInfo:
    """folder: folder of the run's files. config: resolved configuration as plain data. total_steps: number of the last
    step. resume_step: last finished step of the resumed run; None for a run from the beginning.
    """

    project: str
    experiment: str
    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    resume_step: int | None = None
