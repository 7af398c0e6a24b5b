"""The one exception whose message is meant for the user, errors that go from one process to another, and what a process
that is gone had to say."""

import pickle
from collections import deque
from pathlib import Path

LAST_LINES = 20


class UserError(Exception):
    """Something the user can mend: entry points print the message without a traceback. It says what was wrong, where,
    and what to do."""


class Diverged(UserError):  # noqa: N818
    """A model's weights, gradients or outputs are not finite numbers: training cannot go on."""


def portable(error: BaseException) -> Exception:
    """What of an error goes to another process: user errors as they are (or as plain ones, where they do not survive
    the way), others as text."""
    if not isinstance(error, UserError):
        return RuntimeError(f"{type(error).__name__}: {error}")
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return UserError(str(error))
    return error


def last_lines(log: Path) -> list[str]:
    """Of a process's output. Raises OSError."""
    with log.open(errors="replace") as output:
        return [line.rstrip() for line in deque(output, maxlen=LAST_LINES)]


def indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.rstrip().splitlines())
