"""Scores answers in JSON by content. The order of keys, white space, and 1 or 1.0 make no difference."""

from __future__ import annotations

import json
import re
from typing import Any

FENCED = re.compile(r"```(?:json)?\s*\n(.*?)```", re.DOTALL)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    score: float = 1.0,
    format_score: float = 0.0,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 or 0.0, "valid": 1.0 if the response has JSON}.

    The JSON is the last fenced block, or the whole response.
    score: for the right content. format_score: for other JSON. The score without JSON is 0.
    """
    try:
        gold = json.loads(ground_truth)
    except ValueError as error:
        raise ValueError(f"the ground truth {ground_truth[:200]!r} is not JSON: {error}") from error
    blocks = FENCED.findall(solution_str)
    try:
        answer = json.loads(blocks[-1] if blocks else solution_str)
    except (ValueError, RecursionError):
        return {"score": 0.0, "acc": 0.0, "valid": 0.0}
    right = same(answer, gold)
    return {"score": score if right else format_score, "acc": float(right), "valid": 1.0}


def same(one: Any, other: Any) -> bool:
    """Whether the values are equal as JSON. ``true`` is not 1."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
