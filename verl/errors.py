"""The exception whose message is meant for the user, errors sent between processes, and the last output of a dead
process."""

import pickle
from collections import deque
from pathlib import Path

LAST_LINES = 20


class UserError(Exception):
    """An error that the user can fix. Entry points print its message without a traceback. The message says what was
    wrong, where, and what to do."""


def portable(error: BaseException) -> Exception:
    """An error that can be sent to another process: a UserError itself, or a plain UserError with its message if it
    cannot be pickled; any other error as a RuntimeError with its text."""
    if not isinstance(error, UserError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(str(error))
    return error


def last_lines(log: Path) -> list[str]:
    """The last LAST_LINES lines of a process's output. Raises OSError."""
    with log.open(errors="replace") as output:
        return [line.rstrip() for line in deque(output, maxlen=LAST_LINES)]


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
