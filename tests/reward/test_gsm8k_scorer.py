from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.reward.gsm8k import canonical, compute_score, find_answer


def score(text: str, truth: str, **settings) -> dict:
    return compute_score("openai/gsm8k", text, truth, {}, **settings)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She has 6 x 7 = 42.\n#### 42", "42"),
        ("#### 42.", "42"),
        ("####42", "42"),
        ("####   42", "42"),
        ("####\n42", "42"),
        ("#### **42**", "42"),
        ("#### $42", "42"),
        ("#### 1,234", "1234"),
        ("#### $1,234.00", "1234"),
        ("#### 1,234,567.5", "1234567.5"),
        ("#### -5", "-5"),
        ("#### -$5", "-5"),
        ("#### $-5", "-5"),
        ("#### \N{MINUS SIGN}5", "-5"),
        ("#### +5", "5"),
        ("#### 42%", "42"),
        ("#### 42 apples", "42"),
        ("#### .5", "0.5"),
        ("#### 007", "7"),
        ("#### 12\n#### 13", "13"),
        ("#### 12 #### thirteen", "12"),
        ("####42" + " and so on" * 200, "42"),
    ],
)
def test_strict_takes_the_number_behind_the_last_marker(text, answer):
    assert find_answer(text, "strict") == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "42",
        "The answer is 42",
        "### 42",
        "# # # # 42",
        "####",
        "#### forty-two",
        "#### the answer is 42",
        "#### 1/2",
    ],
)
def test_strict_takes_nothing_else(text):
    assert find_answer(text, "strict") is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 42.", "42"),
        ("6 x 7 = 42, so she has 42 apples", "42"),
        ("8-3=5", "5"),
        ("so it is 10-7", "7"),
        ("(8)-3", "3"),
        ("a loss of -3 dollars", "-3"),
        ("costs $1,234.50!", "1234.5"),
        ("options 1,2", "2"),
        ("#### 12 (see page 3)", "3"),
    ],
)
def test_flexible_takes_the_last_number_of_the_text(text, answer):
    assert find_answer(text, "flexible") == answer


def test_flexible_takes_nothing_where_there_is_no_number():
    assert find_answer("I do not know.", "flexible") is None


def test_a_right_answer_a_wrong_one_and_none_score_as_set():
    settings = {"score": 2.0, "format_score": 0.25}
    assert score("#### 42.0", "42", **settings) == {"score": 2.0, "acc": 1.0, "pred": "42"}
    assert score("#### 41", "42", **settings) == {"score": 0.25, "acc": 0.0, "pred": "41"}
    assert score("it is 42", "42", **settings) == {"score": 0.0, "acc": 0.0, "pred": None}
    assert score("it is 42", "42", method="flexible", **settings)["score"] == 2.0


@pytest.mark.parametrize("truth", ["1,200", "1200", " 1200.0 ", "$1200", "+1200"])
def test_the_ground_truth_is_compared_as_a_number_too(truth):
    assert score("#### 1200", truth)["score"] == 1.0


@pytest.mark.parametrize("truth", ["", "twelve", "12 apples", "1/2"])
def test_a_ground_truth_that_is_no_number_is_an_error(truth):
    with pytest.raises(ValueError, match="is not a number"):
        score("#### 12", truth)


def test_long_answers_of_thousands_of_digits_are_read_in_no_time():
    digits = "9" * 100_000
    assert score(f"#### {digits}", digits)["score"] == 1.0
    assert score("#" * 100_000 + " " * 100_000 + "1," * 50_000, "1")["acc"] == 1.0


numbers = st.decimals(allow_nan=False, allow_infinity=False, min_value=-(10**12), max_value=10**12, places=3)


@given(numbers, numbers)
def test_canonical_forms_are_equal_exactly_for_equal_numbers(one, other):
    assert (canonical(f"{one:f}") == canonical(f"{other:f}")) == (one == other)


@given(numbers, st.integers(0, 3), st.booleans(), st.booleans(), st.sampled_from(["", ".", "%", ".%"]))
def test_every_way_to_write_a_number_has_one_canonical_form(number, zeros, separators, dollar, ending):
    digits = f"{abs(number):{',' if separators else ''}f}" + "0" * zeros
    written = f"{'-' if number < 0 else ''}{'$' if dollar else ''}{digits}{ending}"
    form = canonical(written)
    assert Decimal(form) == number
    assert form == canonical(f"{number:f}")
    assert canonical(form) == form
    assert find_answer(f"thinking 1, 2, 3\n#### {written}", "strict") == form
    assert find_answer(f"the answer is {written}", "flexible") == form


@given(st.text(alphabet="0123456789.,-+$#/ %x\n", max_size=30))
def test_any_text_is_read_without_failing_and_what_is_found_is_a_number(text):
    for method in ("strict", "flexible"):
        answer = find_answer(text, method)
        if answer is not None:
            assert canonical(answer) == answer
            assert Decimal(answer).is_finite()
