"""Finding the known name that a misspelt one was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(key: str, known: Iterable[str]) -> str:
    """The known dotted key most like this one: in its last part first, then as a whole."""
    return max(known, key=lambda candidate: (_likeness(key, candidate), -len(candidate)))


def _likeness(key: str, candidate: str) -> float:
    last = SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    whole = SequenceMatcher(None, key, candidate).ratio()
    return 0.6 * last + 0.4 * whole
