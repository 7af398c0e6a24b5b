"""Scores programs by the tests that they pass in a sandbox.

The ground truth is JSON in one of these forms:

    {"inputs": [text, ...], "outputs": [text, ...]}                  a program: standard input and output
    {"fn_name": name, "inputs": [arguments, ...], "outputs": [...]}  a function, or a method of a class Solution
    {"asserts": [statement, ...], "setup": code}                     statements that must not raise; "test_list" and
                                                                     "assert_case" are other names of "asserts"

Expected outputs stay outside the sandbox. Only statements run inside, beside the solution.
"""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

from verl.reward import sandbox
from verl.reward.dependencies import MissingDependency
from verl.reward.sandbox import Limits, Sandbox

BLOCK = re.compile(r"^[ \t]*```(\w*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
ASSERTS = ("asserts", "test_list", "assert_case")
TOLERANCE = 1e-6  # relative and absolute, for numbers with a decimal point

# Sites with function tasks import these before a solution.
PRELUDE = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *
"""
# Runs the solution, reads {"mark", "name", "arguments"} or {"mark", "tests"}, and prints the mark and the value last.
# If the solution ends the process, no mark is printed.
CALLER = """\
import json, sys
source = open("solution.py", encoding="utf-8").read()
space = {"__name__": "solution"}
exec(PRELUDE, space)
exec(compile(source, "solution.py", "exec"), space)
task = json.loads(sys.stdin.readline())
value = None
if "name" in task:
    owner = space["Solution"]() if task["name"] not in space else None
    function = getattr(owner, task["name"]) if owner is not None else space[task["name"]]
    value = function(*task["arguments"])
else:
    exec(compile(task["tests"], "tests.py", "exec"), space)
print("\\n" + task["mark"] + json.dumps(value))
""".replace("PRELUDE", repr(PRELUDE))


# (sandbox, code) -> why the test failed, or "" if it passed
Test = Callable[[Sandbox, str], str]


def missing(*, limits: Mapping[str, int], **_: Any) -> MissingDependency | None:
    return sandbox.missing(Limits(**limits))


def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: str,
    extra_info: dict[str, Any],
    *,
    limits: Mapping[str, int],
    score_by: Literal["all", "share"] = "all",
    total_seconds: float = 15.0,
    max_tests: int | None = None,
) -> dict[str, Any]:
    """{"score", "acc": 1.0 if every test passed, else 0.0, "passed": share of tests that passed, "failure": the first
    failure or ""}.

    limits: see ``sandbox.Limits``.
    score_by: "all": the score is ``acc``, and testing stops at the first failure; "share": the score is ``passed``.
    total_seconds: no test starts after this time. Tests that were not started count as failed.
    max_tests: runs at most this number of tests.
    """
    tests = read_tests(ground_truth)[:max_tests]
    code = find_code(solution_str)
    failures = ["no code in the response"]
    passed = 0
    if code is not None:
        failures = []
        with Sandbox(Limits(**limits)) as box:
            end = time.monotonic() + total_seconds
            for test in tests:
                late = time.monotonic() >= end
                failure = "the tests took too long" if late else test(box, code)
                passed += not failure
                failures += [failure] if failure else []
                if late or (failures and score_by == "all"):
                    break
    acc, share = float(passed == len(tests)), passed / len(tests)
    failure = failures[0] if failures else ""
    return {"score": acc if score_by == "all" else share, "acc": acc, "passed": share, "failure": failure}


def find_code(text: str) -> str | None:
    """The last fenced block marked as Python or without a language. Its closing fence may be missing."""
    blocks = [code for language, code in BLOCK.findall(text) if language.lower() in ("python", "python3", "py", "")]
    return blocks[-1] if blocks else None


def read_tests(ground_truth: str) -> list[Test]:
    """The tests of a ground truth. Raises ValueError if it has none of the forms above."""
    try:
        truth = json.loads(ground_truth)
    except ValueError as error:
        raise ValueError(f"the ground truth {ground_truth[:200]!r} is not JSON: {error}") from error
    tests: list[Test] = []
    if isinstance(truth, dict):
        if key := next((key for key in ASSERTS if key in truth), None):
            tests = [_statements(f"{truth.get('setup', '')}\n{statement}") for statement in truth[key]]
        elif {"inputs", "outputs"} <= truth.keys():
            pairs = list(zip(truth["inputs"], truth["outputs"], strict=True))
            name = truth.get("fn_name")
            tests = [_call(name, *pair) if name else _program(*pair) for pair in pairs]
    if not tests:
        raise ValueError(f"the ground truth {ground_truth[:200]!r} has no tests: inputs and outputs, or asserts")
    return tests


def _program(given: Any, expected: Any) -> Test:
    given, expected = _text(given), _text(expected)

    def run(box: Sandbox, code: str) -> str:
        result = box.run(code, stdin=given)
        if result.reason:
            return result.reason
        return "" if same_output(result.stdout, expected) else "it printed something else"

    return run


def _text(value: Any) -> str:
    """The value as text. A list holds the lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(name: str, arguments: Any, expected: Any) -> Test:
    """A test that calls a function.

    arguments: a list, or text with one JSON value per line. expected: the value, or a list of just the value."""
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
    if isinstance(expected, str):
        with suppress(ValueError):  # not JSON: the text itself is expected
            expected = json.loads(expected)

    def run(box: Sandbox, code: str) -> str:
        failure, value = _in_process(box, code, {"name": name, "arguments": arguments})
        if failure:
            return failure
        alone = isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])
        return "" if alone or same_value(value, expected) else "the returned value is wrong"

    return run


def _statements(tests: str) -> Test:
    return lambda box, code: _in_process(box, code, {"tests": tests})[0]


def _in_process(box: Sandbox, code: str, task: dict[str, Any]) -> tuple[str, Any]:
    """(why the test failed or "", the value)."""
    mark = secrets.token_hex(16)
    stdin = json.dumps({**task, "mark": mark}) + "\n"
    result = box.run(CALLER, stdin=stdin, files={"solution.py": code})
    if result.reason:
        return result.reason, None
    _, marked, text = result.stdout.rpartition(mark)
    if not marked:
        return "the program ended before the test finished", None
    try:
        return "", json.loads(text)
    except (ValueError, RecursionError):
        return "the returned value cannot be read", None


def same_output(printed: str, expected: str) -> bool:
    """Whether both texts have the same words on the same lines. White space around lines and texts does not count."""
    one, other = ([line.split() for line in text.strip().splitlines()] for text in (printed, expected))
    return len(one) == len(other) and all(map(_same_words, one, other))


def _same_words(one: Sequence[str], other: Sequence[str]) -> bool:
    return len(one) == len(other) and all(map(_same_word, one, other))


def _same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        numbers = float(one), float(other)
    except ValueError:
        return False
    return any(mark in one + other for mark in ".eE") and _close(*numbers)


def same_value(one: Any, other: Any) -> bool:
    """Whether the values are equal as JSON, floats within ``TOLERANCE``."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_value, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_value(one[key], other[key]) for key in one)
    if isinstance(one, bool) or isinstance(other, bool):
        return one is other
    if isinstance(one, float) or isinstance(other, float):
        return isinstance(one, int | float) and isinstance(other, int | float) and _close(one, other)
    return one == other


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
