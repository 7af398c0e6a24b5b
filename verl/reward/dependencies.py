"""A dependency of a scorer that is missing on this machine."""

from __future__ import annotations

from typing import NamedTuple


class MissingDependency(NamedTuple):
    """why: the reason that the scorer cannot run here. fix: what the user can do."""

    why: str
    fix: str

    def __str__(self) -> str:
        return f"{self.why}: {self.fix}"
