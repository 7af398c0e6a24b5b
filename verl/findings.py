"""Findings of the checks, collected so that the user sees all of them together."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl.config.loading.problems import Problem


@dataclass
class Findings:
    """problems: they stop the run. warnings: likely mistakes. unchecked: what could not be checked here and now.
    notices: what was decided for the user."""

    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)

    def problem(self, key: str, value: object, why: str, fix: str) -> None:
        self.problems.append(Problem(key, value, why, fix))

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def cannot_check(self, text: str) -> None:
        self.unchecked.append(text)

    def note(self, text: str) -> None:
        self.notices.append(text)
