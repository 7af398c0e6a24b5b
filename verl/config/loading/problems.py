"""Problems of a configuration, and the report of all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final


class _NoValue:
    def __repr__(self) -> str:
        return "NO_VALUE"


NO_VALUE: Final = _NoValue()


@dataclass(frozen=True)
class Problem:
    """key: the full key, or the argument as typed. value: its value; NO_VALUE if there is none to show. why: what is
    wrong. fix: what would work."""

    key: str
    value: object
    why: str
    fix: str


def report(problems: Sequence[Problem]) -> str:
    """All problems in one numbered text."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    lines = [f"{count}; nothing was started."]
    for number, problem in enumerate(problems, 1):
        setting = problem.key if problem.value is NO_VALUE else f"{problem.key}={shown(problem.value)}"
        lines += [f"{number:3}. {setting}", f"     why: {problem.why}", f"     fix: {problem.fix}"]
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A value as typed on the command line."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{shown(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(shown(item) for item in value) + "]"
    return repr(value) if value == "" else str(value)
