"""Programs, scored by the tests that they pass in a sandbox.

The ground truth is JSON, one of

    {"inputs": [text, ...], "outputs": [text, ...]}                  a program: standard input and output
    {"fn_name": name, "inputs": [arguments, ...], "outputs": [...]}  a function, or a method of a class Solution
    {"asserts": [statement, ...], "setup": code}                     statements that must not raise; also "test_list",
                                                                     "assert_case"

What is expected stays outside of the sandbox; only of statements it cannot, for they run beside the solution.
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
TOLERANCE = 1e-6  # of numbers with a decimal point, relative and absolute

# Solutions to function tasks are written for sites that import these.
PRELUDE = """\
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *; from collections import *; from functools import *; from heapq import *
from itertools import *; from math import *; from typing import *
"""
# Reads {"mark", "name", "arguments"}, or {"mark", "tests"}, after the solution has run, and ends with the mark and the
# value. A solution that ends the process leaves no mark.
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


# (sandbox, code) -> why the test failed, "" when it passed
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
    """{"score", "acc": 1.0 when every test passed, else 0.0, "passed": the share that did, "failure": the first one's}.

    limits: see ``sandbox.Limits``.
    score_by: "all": the score is ``acc``, and testing ends with the first failure; "share": it is ``passed``.
    total_seconds: no test begins after them; those not reached have failed. max_tests: only the first so many.
    """
    tests = read_tests(ground_truth)[:max_tests]
    code = find_code(solution_str)
    failures = ["no code in the response"]
    passed = 0
    if code is not None:
        failures = []
        with Sandbox(Limits(**limits)) as place:
            end = time.monotonic() + total_seconds
            for test in tests:
                late = time.monotonic() >= end
                failure = "the tests took too long" if late else test(place, code)
                passed += not failure
                failures += [failure] if failure else []
                if late or (failures and score_by == "all"):
                    break
    acc, share = float(passed == len(tests)), passed / len(tests)
    failure = failures[0] if failures else ""
    return {"score": acc if score_by == "all" else share, "acc": acc, "passed": share, "failure": failure}


def find_code(text: str) -> str | None:
    """The last fenced block that is Python's or nobody's. The last fence may be missing."""
    blocks = [code for language, code in BLOCK.findall(text) if language.lower() in ("python", "python3", "py", "")]
    return blocks[-1] if blocks else None


def read_tests(ground_truth: str) -> list[Test]:
    """ValueError for what is none of the forms above."""
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

    def run(place: Sandbox, code: str) -> str:
        ending = place.run(code, stdin=given)
        if ending.reason:
            return ending.reason
        return "" if same_output(ending.stdout, expected) else "it printed something else"

    return run


def _text(value: Any) -> str:
    """A list is its lines."""
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


def _call(name: str, arguments: Any, expected: Any) -> Test:
    """arguments: a list, or text with a JSON value a line. expected: the value, or a list with nothing but it."""
    if isinstance(arguments, str):
        arguments = [json.loads(line) for line in arguments.splitlines() if line.strip()]
    if isinstance(expected, str):
        with suppress(ValueError):  # else it is the text
            expected = json.loads(expected)

    def run(place: Sandbox, code: str) -> str:
        failure, value = _in_process(place, code, {"name": name, "arguments": arguments})
        if failure:
            return failure
        alone = isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])
        return "" if alone or same_value(value, expected) else "it returned something else"

    return run


def _statements(tests: str) -> Test:
    return lambda place, code: _in_process(place, code, {"tests": tests})[0]


def _in_process(place: Sandbox, code: str, task: dict[str, Any]) -> tuple[str, Any]:
    """(why it failed or "", the value)."""
    mark = secrets.token_hex(16)
    stdin = json.dumps({**task, "mark": mark}) + "\n"
    ending = place.run(CALLER, stdin=stdin, files={"solution.py": code})
    if ending.reason:
        return ending.reason, None
    _, marked, text = ending.stdout.rpartition(mark)
    if not marked:
        return "it ended before the test did", None
    try:
        return "", json.loads(text)
    except (ValueError, RecursionError):
        return "what it returned cannot be read", None


def same_output(printed: str, expected: str) -> bool:
    """Line by line, word by word; white space at the ends of lines and of the whole does not count."""
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
    """Equal as JSON (a tuple is a list), floats within the tolerance."""
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
