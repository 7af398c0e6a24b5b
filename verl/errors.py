"""The one exception whose message is meant for the user: entry points print it without a traceback."""


class UserError(Exception):
    """Something the user can mend. The message says what was wrong, where, and what to do."""
