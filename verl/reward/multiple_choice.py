"""Scores multiple choice by the letter that a response chooses."""

from __future__ import annotations

import re
from typing import Any

from verl.reward.boxed import last_boxed

LETTER = r"[(\[*\s]*([A-Z])(?![\w'])"
SAID = re.compile(r"\b(?i:answer|choice|option)\b(?i:\s+(?:is|would be|choice|option))*\s*[:=]?" + LETTER)
ALONE = re.compile(r"[(\[*\s]*([A-Z])[)\]*.:\s]*")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    score: float = 1.0,
    wrong_score: float = 0.0,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 or 0.0, "pred": the chosen letter, or None}. ground_truth: a letter."""
    gold = ALONE.fullmatch(ground_truth.strip().upper())
    if gold is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a letter")
    letter = find_letter(solution_str)
    right = letter == gold[1]
    return {"score": score if right else wrong_score, "acc": float(right), "pred": letter}


def find_letter(text: str) -> str | None:
    """The letter that the text chooses, or None.

    It is the letter in the last box, or after the last "answer is", "Answer:" or "option", or on the last line."""
    boxed = last_boxed(text)
    if boxed is not None and (found := ALONE.fullmatch(re.sub(r"\\text\w*\{(.*)\}", r"\1", boxed))):
        return found[1]
    if said := SAID.findall(text):
        return said[-1]
    lines = text.strip().splitlines()
    found = ALONE.fullmatch(lines[-1]) if lines else None
    return found[1] if found else None
