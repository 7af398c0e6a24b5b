"""Scores GSM8K and other tasks with one number as answer. The answer and the ground truth are compared as numbers."""

from __future__ import annotations

import re
from typing import Any, Literal

# A minus between two numbers is not a sign. "$" may stand before or after the sign. Commas separate thousands only.
# Possessive quantifiers (++) keep backtracking from matching the 12 of "125" or of "12/5".
NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]])[-+\u2212])?(?:[$€£](?P<inner>[-+\u2212])?)?"
    r"(?P<digits>(?>\d{1,3}(?:,\d{3})++(?!\d)(?:\.\d++)?|\d++(?:\.\d++)?|(?<![\d.])\.\d++))"
)
# The marker, white space or bold marks, and a number. A fraction is not a number.
MARKED = re.compile(r"####[\s*]*" + NUMBER.pattern + r"(?!\s*/\s*\d)")


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    method: Literal["strict", "flexible"] = "strict",
    score: float = 1.0,
    format_score: float = 0.0,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 or 0.0, "pred": the answer in ``canonical`` form, or None}.

    method: "strict": the number after the last "####" that precedes a number; "flexible": the last number of the text.
    score: for a right answer. format_score: for a wrong answer. The score without any answer is 0.
    """
    gold = canonical(ground_truth.strip())
    if gold is None:
        raise ValueError(f"the ground truth {ground_truth!r} is not a number")
    answer = find_answer(solution_str, method)
    right = answer == gold
    value = score if right else format_score if answer is not None else 0.0
    return {"score": value, "acc": float(right), "pred": answer}


def find_answer(text: str, method: str) -> str | None:
    """The answer in ``canonical`` form, or None."""
    found = list((MARKED if method == "strict" else NUMBER).finditer(text))
    return _plain(found[-1]) if found else None


def canonical(number: str) -> str | None:
    """The number without separators, currency, plus sign and redundant zeros, or None if it is not a number.

    Two results are equal if and only if the numbers are equal: "$1,234.50" -> "1234.5", "42." -> "42", "-0.0" -> "0",
    "42%" -> "42". The result is text, so it is exact for any length.
    """
    found = NUMBER.match(number)
    if found is None or number[found.end() :] not in ("", ".", "%", ".%", "%."):
        return None
    return _plain(found)


def _plain(found: re.Match[str]) -> str:
    whole, _, fraction = found["digits"].replace(",", "").partition(".")
    digits = ".".join(part for part in (whole.lstrip("0") or "0", fraction.rstrip("0")) if part)
    negative = (found["sign"] or found["inner"] or "+") != "+"
    return f"-{digits}" if negative and digits != "0" else digits
