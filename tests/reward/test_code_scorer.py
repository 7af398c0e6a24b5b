"""Programs scored by tests, in the real sandbox."""

from __future__ import annotations

import json

import pytest

from verl.config.sections.models import RewardConfig
from verl.reward.code_tests import find_code, same_output, same_value
from verl.reward.scorers import ScorerSpec, make_scorer, settings_of

TWICE = {"inputs": ["1\n", "2\n", "30\n"], "outputs": ["2\n", "4\n", "60"]}
ADD = {"fn_name": "add", "inputs": [[[1, 2], 3], [[], 0.5]], "outputs": [6, [0.5]]}
ASSERTS = {
    "setup": "import math",
    "asserts": ["assert f(1) == 2", "assert f(math.inf) == math.inf", "assert f(0) == 1"],
}


def scored(code: str, truth: dict | str, source: str = "apps", **settings) -> tuple[float, dict]:
    """Through the registry, as a run does it."""
    spec = ScorerSpec(kwargs=settings_of(RewardConfig(code=settings)))
    sample = {
        "data_source": source,
        "solution_str": f"Well:\n```python\n{code}\n```\nThat is it.",
        "ground_truth": truth if isinstance(truth, str) else json.dumps(truth),
        "extra_info": "{}",
    }
    score, extra = make_scorer(spec)(sample)
    return score, json.loads(extra)


@pytest.mark.parametrize("source", ["apps", "taco", "codecontests", "codeforces", "code"])
def test_a_program_that_passes_every_test_has_the_full_score(source):
    found = scored("print(int(input()) * 2)", TWICE, source)
    assert found == (1.0, {"acc": 1.0, "passed": 1.0, "failure": ""})


def test_the_score_is_all_or_nothing_or_the_share_of_tests_that_pass():
    square = "n = int(input())\nprint(n * n)"
    assert scored(square, TWICE)[0] == 0.0
    score, extra = scored(square, TWICE, score_by="share")
    assert score == extra["passed"] == pytest.approx(1 / 3)
    assert extra["failure"] == "it printed something else"
    assert scored("print(int(input()) * 2 if input else 0)", TWICE, score_by="share", max_tests=1)[0] == 1.0


@pytest.mark.parametrize(
    "code",
    [
        "def add(numbers, more): return sum(numbers) + more",
        "class Solution:\n    def add(self, numbers: List[int], more: int) -> int:\n        return sum(numbers) + more",
        "def add(numbers, more):\n    print('thinking', end='')\n    return reduce(operator.add, numbers, more)",
    ],
)
def test_a_function_is_called_and_what_it_returns_compared(code):
    assert scored(code, ADD) == (1.0, {"acc": 1.0, "passed": 1.0, "failure": ""})


def test_arguments_may_be_lines_of_json_and_a_tuple_is_a_list():
    truth = {"fn_name": "pair", "inputs": ['"a"\n{"b": [1]}'], "outputs": ['["a", {"b": [1]}]']}
    assert scored("def pair(x, y): return x, y", truth)[0] == 1.0
    assert scored("def pair(x, y): return y, x", truth)[0] == 0.0


def test_statements_must_not_raise():
    assert scored("def f(x): return x + 1", ASSERTS)[0] == 1.0
    assert scored("def f(x): return 2", ASSERTS, score_by="share")[0] == pytest.approx(1 / 3)
    assert scored("def f(x): return x + 1", {"test_list": ["assert f(1) == 2"]})[0] == 1.0


@pytest.mark.parametrize(
    ("code", "failure"),
    [
        ("import sys; sys.exit(0)", "the program ended before the test finished"),
        ("import os; os._exit(0)", "the program ended before the test finished"),
        ("def f(x): raise SystemExit", "the program ended before the test finished"),
        ("def f(x):", "IndentationError: expected an indented block after function definition on line 1"),
        ("def g(x): return 2", "NameError: name 'f' is not defined"),
        ("def f(x):\n    while True: pass", "it exceeded its CPU time"),
        ("import socket\ndef f(x): socket.socket()", "PermissionError: [Errno 1] Operation not permitted"),
    ],
)
def test_what_ends_or_breaks_before_the_test_does_not_pass(code, failure):
    score, extra = scored(code, ASSERTS, limits={"cpu_seconds": 1})
    assert (score, extra["failure"]) == (0.0, failure)


def test_what_is_expected_is_not_in_the_sandbox():
    """A program that prints any answer that it can find anywhere finds none."""
    search = r"""
import gc, os, re, sys
found = [sys.stdin.read(), str(os.environ), str(sys.argv)]
for folder, _, names in os.walk("/work"):
    found += [open(os.path.join(folder, name)).read() for name in names]
found += [str(thing) for thing in gc.get_objects() if isinstance(thing, (list, dict))]
print(*re.findall(r"answer-\d+", " ".join(found))[:1])
"""
    assert scored(search, {"inputs": ["answer-1"], "outputs": ["answer-1"]})[0] == 1.0  # it does search
    assert scored(search, {"inputs": ["7"], "outputs": ["answer-555"]})[0] == 0.0


def test_no_further_test_begins_when_time_is_up():
    truth = {"inputs": [""] * 3, "outputs": ["", "", ""]}
    found = scored("import time; time.sleep(1)", truth, score_by="share", total_seconds=0.5)
    share = pytest.approx(1 / 3)
    assert found == (share, {"acc": 0.0, "passed": share, "failure": "the tests took too long"})


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("```python\na\n```\n```\nb\n```", "b\n"),
        ("```py\na\n```\nas in\n```cpp\nb\n```", "a\n"),
        ("```python\nx = '```'\ny\n```", "x = '```'\ny\n"),
        ("```python\ncut off", "cut off"),
        ("no code", None),
    ],
)
def test_the_last_block_of_python_is_the_solution(text, code):
    assert find_code(text) == code


def test_a_response_without_code_has_no_score():
    spec = ScorerSpec(kwargs=settings_of(RewardConfig()))
    sample = {"data_source": "apps", "solution_str": "no", "ground_truth": json.dumps(TWICE), "extra_info": "{}"}
    score, extra = make_scorer(spec)(sample)
    assert (score, json.loads(extra)["failure"]) == (0.0, "no code in the response")


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ("1 2\n3", "1  2 \n3\n\n", True),
        ("1 2 3", "1 2\n3", False),
        ("0.3333333", "0.33333330001", True),
        ("0.3", "0.4", False),
        ("100000000", "100000001", False),
        ("1.0", "1", True),
        ("yes", "Yes", False),
    ],
)
def test_outputs_are_compared_word_by_word(one, other, equal):
    assert same_output(one, other) is equal


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ([1, [2.0, None]], [1, [2.0000001, None]], True),
        ({"a": 1}, {"a": 1.0}, True),
        (True, 1, False),
        ([1], [1, 2], False),
        ("1", 1, False),
        (10**30, 10**30 + 1, False),
        (float("nan"), 1.0, False),
    ],
)
def test_values_are_compared_with_a_tolerance_for_floats(one, other, equal):
    assert same_value(one, other) is equal


@pytest.mark.parametrize("truth", ["", "[]", "{}", '{"inputs": [], "outputs": []}', '{"inputs": ["1"], "outputs": []}'])
def test_a_ground_truth_without_tests_is_an_error(truth):
    with pytest.raises(ValueError):
        scored("pass", truth)
