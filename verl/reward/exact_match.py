"""Scores answers that must be the same text as the ground truth."""

from __future__ import annotations

from typing import Any


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    marker: str | None = None,
    ignore_case: bool = False,
    score: float = 1.0,
    wrong_score: float = 0.0,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 or 0.0, "pred": the answer, or None}. Each run of white space counts as one space.

    marker: the answer is the text after its last occurrence; a response without it has no answer. None: the answer is
        the whole response.
    """
    _, found, answer = solution_str.rpartition(marker) if marker else ("", True, solution_str)
    right = bool(found) and _plain(answer, ignore_case) == _plain(ground_truth, ignore_case)
    pred = " ".join(answer.split()) if found else None
    return {"score": score if right else wrong_score, "acc": float(right), "pred": pred}


def _plain(text: str, ignore_case: bool) -> str:
    text = " ".join(text.split())
    return text.casefold() if ignore_case else text
