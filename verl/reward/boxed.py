"""The last ``\\boxed{...}`` of a text: where answers to mathematical questions are put."""

from __future__ import annotations

import re

OPENING = re.compile(r"\\f?boxed\s*(\{|(?=\s[^\s{]))")  # \boxed{...}, or \boxed and one word


def last_boxed(text: str) -> str | None:
    """What is in the last box that is closed, braces inside it counted; None without one."""
    for opening in reversed(list(OPENING.finditer(text))):
        rest = text[opening.end() :]
        if not opening[1]:
            return rest.split(maxsplit=1)[0].rstrip("$.,")
        if (length := _closing(rest)) is not None:
            return rest[:length].strip()
    return None


def _closing(text: str) -> int | None:
    """Where the brace is that closes one open before ``text``. A backslash makes the character behind it plain."""
    depth, escaped = 1, False
    for place, character in enumerate(text):
        if not escaped and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return place
        escaped = character == "\\" and not escaped
    return None
