"""Finds the last ``\\boxed{...}`` of a text, which holds the answer to a mathematical question."""

from __future__ import annotations

import re

OPENING = re.compile(r"\\f?boxed\s*(\{|(?=\s[^\s{]))")  # \boxed{...}, or \boxed and one word


def last_boxed(text: str) -> str | None:
    """The content of the last box with balanced braces, or None."""
    for opening in reversed(list(OPENING.finditer(text))):
        rest = text[opening.end() :]
        if not opening[1]:
            return rest.split(maxsplit=1)[0].rstrip("$.,")
        if (length := _closing(rest)) is not None:
            return rest[:length].strip()
    return None


def _closing(text: str) -> int | None:
    """Index of the brace that closes one opened before ``text``, or None. A backslash escapes the next character."""
    depth, escaped = 1, False
    for place, character in enumerate(text):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
        escaped = character == "\\" and not escaped
    return None
