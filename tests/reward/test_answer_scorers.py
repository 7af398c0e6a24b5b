"""Scorers that compare an answer found in the text with the ground truth."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from helpers import ROOT

from verl.reward import exact_match, json_match, math_dapo, multiple_choice, symbolic_math
from verl.reward.boxed import last_boxed


def scored(scorer, response: str, truth: str, **settings):
    return scorer.compute_score("any", response, truth, {}, **settings)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{7}", "7"),
        (r"\boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\fbox{x} \boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a{b}c}d}", "a{b}c"),
        (r"\boxed{whole} \boxed{cut off", "whole"),
        (r"$\boxed 5$.", "5"),
        ("no box", None),
        (r"\boxed{", None),
    ],
)
def test_the_last_closed_box_is_found(text, content):
    assert last_boxed(text) == content


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        (r"so \boxed{\frac12}", "0.5"),
        (r"\boxed{x^2+1}", "1+x^2"),
        (r"The set is $\{1,2\}$.", r"\{2,1\}"),
        (r"\boxed{4} no, \boxed{\frac{\sqrt{3}}{2}}", r"\frac{\sqrt3}{2}"),
        ("The answer is 12", "$12$"),
    ],
)
def test_math_is_right_when_equal_as_mathematics(response, truth):
    assert scored(symbolic_math, response, truth, score=2.0)["score"] == 2.0


@pytest.mark.parametrize(("response", "truth"), [(r"\boxed{3}", "4"), ("no idea", "4"), (r"\boxed{x+1}", "x")])
def test_math_is_wrong_otherwise(response, truth):
    assert scored(symbolic_math, response, truth, wrong_score=-0.5)["score"] == -0.5


def test_math_without_its_package_is_missing_it_and_says_what_to_install():
    code = "from verl.reward.scorers import check_scorers; check_scorers(['math'], {'math': {}})"
    without_packages = [sys.executable, "-S", "-c", code]
    ended = subprocess.run(without_packages, capture_output=True, text=True, cwd=ROOT, env={"PYTHONPATH": str(ROOT)})
    assert ended.returncode == 1
    assert 'needs the package math-verify: run pip install -e ".[math]"' in ended.stderr


@pytest.mark.parametrize(
    ("found", "truth"),
    [
        (r"\frac12", r"\dfrac{1}{2}"),
        ("$1,234$", "1234"),
        ("x = 5", "5"),
        (r"12 \text{ cm}", "12"),
        (r"\boxed{7}.", "7"),
        ("**42**", "42"),
        (r"90^\circ", "90"),
        (r"\sqrt 2", r"\sqrt{2}"),
        (r"\$3", "3"),
        (r"\left(1, 2\right)", "(1,2)"),
    ],
)
def test_dapo_compares_answers_without_what_does_not_change_them(found, truth):
    assert scored(math_dapo, f"Well.\nAnswer: {found}\n", truth)["score"] == 1.0


def test_dapo_takes_the_last_answer_or_the_last_box():
    response = "Answer: 3.\nOr \\boxed{4}?\nAnswer: 5"
    assert scored(math_dapo, response, "5") == {"score": 1.0, "acc": 1.0, "pred": "5"}
    assert scored(math_dapo, response, "4", method="boxed") == {"score": 1.0, "acc": 1.0, "pred": "4"}
    assert scored(math_dapo, response, "3") == {"score": -1.0, "acc": 0.0, "pred": "5"}
    assert scored(math_dapo, "no answer", "3") == {"score": -1.0, "acc": 0.0, "pred": None}
    assert scored(math_dapo, "Answer: 1,2", "12")["acc"] == 0.0


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        (r"I think \boxed{\text{B}}", "B"),
        ("The answer is (C).", "C"),
        ("First the answer is A. No: the correct option is **D**.", "D"),
        ("Answer: D", "D"),
        ("Let me see.\n(A)", "A"),
        ("The answer is a banana", None),
        ("Answer: Apple", None),
        ("", None),
    ],
)
def test_the_letter_that_a_response_settles_on_is_found(response, letter):
    assert multiple_choice.find_letter(response) == letter


def test_multiple_choice_compares_letters():
    assert scored(multiple_choice, "Answer: B", "(b)") == {"score": 1.0, "acc": 1.0, "pred": "B"}
    assert scored(multiple_choice, "Answer: C", "B", wrong_score=-1.0)["score"] == -1.0
    with pytest.raises(ValueError, match="'blue' is not a letter"):
        scored(multiple_choice, "Answer: B", "blue")


def test_texts_are_compared_whole_or_behind_a_marker():
    assert scored(exact_match, " two\n words ", "two words")["score"] == 1.0
    assert scored(exact_match, "Two words", "two words")["score"] == 0.0
    assert scored(exact_match, "Two words", "two words", ignore_case=True)["score"] == 1.0
    assert scored(exact_match, "A => 1 => 2", "2", marker="=>") == {"score": 1.0, "acc": 1.0, "pred": "2"}
    assert scored(exact_match, "2", "2", marker="=>") == {"score": 0.0, "acc": 0.0, "pred": None}


TRUTH = json.dumps({"a": [1, 2.0], "b": {"c": None, "d": True}})


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ('{"b": {"d": true, "c": null}, "a": [1.0, 2]}', 1.0),
        ('Here:\n```json\n{"a": [1, 2], "b": {"c": null, "d": true}}\n```\nDone.', 1.0),
        ('{"a": [2, 1], "b": {"c": null, "d": true}}', 0.1),
        ('{"a": [1, 2], "b": {"c": null, "d": 1}}', 0.1),  # true is not 1
        ('{"a": [1, 2]}', 0.1),
        ('{"a": [1, 2], ', 0.0),
        ("[" * 100_000, 0.0),
    ],
)
def test_json_is_compared_by_content(response, score):
    assert scored(json_match, response, TRUTH, format_score=0.1)["score"] == score


@pytest.mark.parametrize(("scorer", "truth"), [(json_match, "{"), (symbolic_math, "")])
def test_a_ground_truth_that_cannot_be_read_is_an_error(scorer, truth):
    with pytest.raises(ValueError, match="the ground truth"):
        scored(scorer, "1", truth)
