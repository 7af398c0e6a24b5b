"""Stop strings, watched token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# A UTF-8 character has at most four bytes, each of which may be a token: past that, U+FFFD is what the model wrote.
_LONGEST_CHARACTER = 4


class StopWatch:
    """Sees a response's tokens one at a time and says when one completes a stop string.

    Text is decoded in small windows that start at a token already decoded, so that a tokenizer's treatment of a
    text's first token (a stripped space) and characters spread over several tokens come out as in the whole text.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]):
        self._tokenizer = tokenizer
        self._stops = tuple(stops)
        self._keep = max(map(len, stops)) - 1
        self._tail = ""  # the last characters decoded for good
        self._window: list[int] = []  # tokens whose text is context, then tokens not decoded for good
        self._context = 0

    def push(self, token: int) -> bool:
        """True when this token completes a stop string."""
        self._window.append(token)
        context_text = self._decode(self._window[: self._context])
        fresh = self._decode(self._window)[len(context_text) :]
        text = self._tail + fresh
        hit = any(text.find(stop, max(0, len(self._tail) - len(stop) + 1)) >= 0 for stop in self._stops)
        pending = len(self._window) - self._context
        if not fresh.endswith("\ufffd") or pending >= _LONGEST_CHARACTER:
            self._tail = text[-self._keep :] if self._keep else ""
            self._window = self._window[self._context :]
            self._context = pending
        return hit

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
