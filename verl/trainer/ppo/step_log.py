"""What one step reports: its metrics, and the seconds of its stages."""

from __future__ import annotations

from collections.abc import Mapping

from verl.tracking import StageTimer


class StepLog:
    """metrics: name -> value. timer: wall seconds by stage. One for each step, and one for each validation."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.timer = StageTimer()

    def set(self, metrics: Mapping[str, float]) -> None:
        """Adds these metrics, in place of earlier ones of the same names."""
        self.metrics |= metrics

    def add(self, metrics: Mapping[str, float]) -> None:
        """Adds these numbers to earlier ones of the same names: counts and seconds of a stage that runs several
        times in a step."""
        for name, value in metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value
