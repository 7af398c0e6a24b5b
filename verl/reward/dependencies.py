"""What a scorer is missing on this machine."""

from __future__ import annotations

from typing import NamedTuple


class MissingDependency(NamedTuple):
    """why: the scorer cannot run here. fix: what to do."""

    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.why}: {self.fix}"
