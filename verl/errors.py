"""The one exception whose message is meant for the user, and errors that go from one process to another."""

import pickle


class UserError(Exception):
    """Something the user can mend: entry points print the message without a traceback. It says what was wrong, where,
    and what to do."""


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
