"""The command line: ``key=value`` in Hydra's override grammar, read by Hydra's own parser, and a few options."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from verl.config.loading.problems import NO_VALUE, Problem

QUOTING = "quote the value inside the shell's quotes, as in 'key=\"some, text\"'"


@dataclass(frozen=True)
class Override:
    """text: the value as typed. remove: ``~key``, back to the default."""

    key: str
    value: Any
    text: str
    remove: bool = False


@dataclass
class Arguments:
    """help: the words after --help; None without it."""

    files: list[str] = field(default_factory=list)
    overrides: list[Override] = field(default_factory=list)
    help: list[str] | None = None
    problems: list[Problem] = field(default_factory=list)


def parse_arguments(argv: Sequence[str]) -> Arguments:
    found = Arguments()
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        option, _, value = argument.partition("=")
        if option in ("--help", "-h"):
            found.help, rest = rest, []
        elif option == "--config" and (value or rest):
            found.files.append(value or rest.pop(0))
        elif argument.startswith("-"):
            found.problems.append(_bad_option(argument))
        else:
            parsed = parse_override(argument)
            (found.overrides if isinstance(parsed, Override) else found.problems).append(parsed)  # type: ignore[arg-type]
    return found


def _bad_option(argument: str) -> Problem:
    why = "--config needs a file" if argument.startswith("--config") else "there is no such option"
    return Problem(argument, NO_VALUE, why, "give settings as key=value, files as --config FILE.yaml; --help says more")


def parse_override(argument: str) -> Override | Problem:
    """One ``key=value``, ``+key=value``, ``++key=value`` or ``~key``; the plus signs change nothing here, as every
    key that may be added is known."""
    sign, key, text = _split(argument)
    if text is None and sign != "~":
        return Problem(argument, NO_VALUE, "this is not of the form key=value", "write key=value")
    if not re.fullmatch(r"[\w.-]+", key):
        return Problem(argument, NO_VALUE, f"{key!r} is not a key", "write a dotted key, as in data.train_batch_size=8")
    try:
        parsed = OverridesParser.create().parse_override(argument)
    except HydraException as error:
        return _plain_text(argument, key, text, error)
    if parsed.is_sweep_override():
        return Problem(
            key, text, "several values for one key (a sweep): a run has one", f"give one value, or {QUOTING}"
        )
    return Override(key, parsed.value(), text or "", remove=parsed.is_delete())


def _split(argument: str) -> tuple[str, str, str | None]:
    """Sign, key and the text after the first "=" (None without one)."""
    match = re.fullmatch(r"(\+\+|\+|~)?([^=]*)(?:=(.*))?", argument, re.DOTALL)
    assert match
    return match[1] or "", match[2].strip(), match[3]


def _plain_text(argument: str, key: str, text: str | None, error: HydraException) -> Override | Problem:
    """A value that is no expression of the grammar and holds none of its brackets, quotes or commas is text, such as a
    path that begins with ~."""
    if text and not re.search(r"""[][{}()'",]""", text):
        return Override(key, text, text)
    reason = str(error).splitlines()[0]
    return Problem(argument, NO_VALUE, f"it cannot be read: {reason}", QUOTING)
