"""Scores mathematical expressions by mathematical equality (math-verify)."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

from verl.reward.boxed import last_boxed
from verl.reward.dependencies import MissingDependency


def missing(**_: Any) -> MissingDependency | None:
    if importlib.util.find_spec("math_verify") is None:
        return MissingDependency("the scorer math needs the package math-verify", 'run pip install -e ".[math]"')
    return None


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    score: float = 1.0,
    wrong_score: float = 0.0,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 or 0.0, "pred": the answer as text, or None}.

    The answer is the content of the last box, or the last expression that math-verify finds. ground_truth: LaTeX or
    plain text, in a box, between dollars or bare.
    """
    from math_verify import parse, verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns if it has no time limit; the pool has one
    bare = "$" not in ground_truth and "\\boxed" not in ground_truth
    gold = parse(_boxed(ground_truth) if bare else ground_truth, parsing_timeout=0)
    if not gold:
        raise ValueError(f"the ground truth {ground_truth!r} is not a mathematical expression")
    box = last_boxed(solution_str)
    answer = parse(solution_str if box is None else _boxed(box), parsing_timeout=0)
    right = bool(answer) and verify(gold, answer, timeout_seconds=None)
    return {"score": score if right else wrong_score, "acc": float(right), "pred": str(answer[-1]) if answer else None}


def _boxed(text: str) -> str:
    return f"\\boxed{{{text}}}"
