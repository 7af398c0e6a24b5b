"""Finds the known name that is nearest to a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def nearest(key: str, known: Iterable[str]) -> str:
    """The known dotted key most similar to this one. Its last part counts most, then the groups that it names."""
    return max(known, key=lambda candidate: _likeness(key, candidate))


def _likeness(key: str, candidate: str) -> float:
    *groups, last = key.split(".")
    *candidate_groups, candidate_last = candidate.split(".")
    shared = [max((_ratio(group, other) for other in candidate_groups), default=0.0) for group in groups]
    in_groups = sum(shared) / len(shared) if shared else 0.0
    return 0.6 * _ratio(last, candidate_last) + 0.3 * in_groups + 0.1 * _ratio(key, candidate)


def _ratio(a: str, b: str) -> float:
    return SequenceMatcher(None, a, b).ratio()
