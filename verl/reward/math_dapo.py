"""Scores competition mathematics as DAPO does (Yu et al. 2025): +1 for the right answer, -1 for any other response.

Answers are compared as texts after the normalization of Minerva's evaluation (Lewkowycz et al. 2022, appendix D.1).
"""

from __future__ import annotations

import re
from typing import Any, Literal

from verl.reward.boxed import last_boxed

ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

UNITS = re.compile(
    r"\b(?:units?|degrees?|percent|dollars?|cents?|square|cubic|feet|foot|inch(?:es)?|miles?|yards?|points?|ways|"
    r"hours?|minutes?|seconds?|days?|cm|mm|km|meters?|mph|integers?)\b"
)
# Applied in this order. Fractions and roots of single characters get braces. Spaces go last, since they end words.
REWRITES = (
    (re.compile(r"\\(?:text|mbox|textbf|mathrm|mathbf)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\[dt]frac"), r"\\frac"),
    (re.compile(r"\\(?:left|right|displaystyle|[!,;: ])"), ""),
    (re.compile(r"\^\s*\{?\\circ\}?|\\?[$%]|°"), ""),
    (UNITS, ""),
    (re.compile(r"\\frac\s*([^\s{\\])\s*([^\s{\\])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s*([^\s{\\\[])"), r"\\sqrt{\1}"),
    (re.compile(r"\b(?:an?|and|the)\s"), ""),
    (re.compile(r"\s+"), ""),
    (re.compile(r"(?<=\d),(?=\d{3}(?:\D|$))"), ""),
)


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    method: Literal["answer", "boxed"] = "answer",
    score: float = 1.0,
    wrong_score: float = -1.0,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 or 0.0, "pred": the normalized answer, or None}.

    method: "answer": the text after the last "Answer:"; "boxed": the content of the last box.
    """
    if method == "boxed":
        found = last_boxed(solution_str)
    else:
        lines = ANSWER.findall(solution_str)
        found = lines[-1] if lines else None
    answer = normalise(found) if found is not None else None
    right = answer == normalise(ground_truth)
    return {"score": score if right else wrong_score, "acc": float(right), "pred": answer}


def normalise(answer: str) -> str:
    """The answer without dollars, boxes, units, spaces, commas in numbers, and a leading "x="."""
    boxed = last_boxed(answer)
    text = (boxed if boxed is not None else answer).strip().strip("*")
    text = text.rsplit("=", 1)[-1]
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.rstrip(".")
