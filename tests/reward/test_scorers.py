from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from verl.errors import UserError
from verl.reward.scorers import ScorerSpec, make_scorer, parse, scorer_of, scorers_of

SAMPLE = {"data_source": "openai/gsm8k", "solution_str": "#### 7", "ground_truth": "7", "extra_info": '{"index": 3}'}


@pytest.fixture
def users_file(tmp_path):
    def write(text: str, name: str = "my_reward.py"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("source", ["openai/gsm8k", "verl/arithmetic"])
def test_a_data_source_is_scored_by_its_own_scorer_with_its_settings(source):
    sample = {**SAMPLE, "data_source": source, "solution_str": "so it is 7"}
    assert make_scorer(ScorerSpec())(sample)[0] == 0.0
    settings = {"gsm8k": {"method": "flexible", "score": 3.0}}
    score, extra = make_scorer(ScorerSpec(kwargs=settings))(sample)
    assert score == 3.0
    assert json.loads(extra) == {"acc": 1.0, "pred": "7"}


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("lighteval/MATH", "math"),
        ("numina_olympiads", "math"),
        ("math_dapo", "math_dapo"),
        ("aime2024", "math_dapo"),
        ("exact_match", "exact_match"),
        ("my/letters", "multiple_choice"),
        ("my/rest", "json_match"),
        ("gsm8k/mine", None),
    ],
)
def test_a_data_source_is_found_by_pattern_the_users_own_first(source, name):
    assert scorer_of(source, {"my/letters": "multiple_choice", "my/*": "json_match"}) == name


def test_the_users_word_goes_before_ours():
    assert scorer_of("openai/gsm8k", {"openai/*": "math"}) == "math"


def test_unknown_data_sources_are_named_with_what_is_known():
    assert scorers_of({"openai/gsm8k", "verl/arithmetic"}, {}) == ["gsm8k"]
    pattern = (
        r"^the data source 'a/b' or 'c/d' has no scorer\..*reward\.data_sources.*gsm8k.*custom_reward_function\.path"
    )
    with pytest.raises(UserError, match=pattern):
        scorers_of({"openai/gsm8k", "c/d", "a/b"}, {})
    with pytest.raises(UserError, match=r"'None'"):
        scorers_of({None, "openai/gsm8k"}, {})


def test_a_data_source_may_have_a_function_of_a_package_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "graders_of_mine.py").write_text(
        "def length(data_source, solution_str, ground_truth, extra_info):\n    return len(solution_str)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    spec = ScorerSpec(data_sources={"my/*": "graders_of_mine:length"})
    assert make_scorer(spec)({**SAMPLE, "data_source": "my/own"}) == (6.0, "{}")
    for place, complaint in (
        ("graders_of_mine:width", "has no function width"),
        ("no_such_thing:f", "No module named"),
    ):
        with pytest.raises(UserError, match=complaint):
            make_scorer(ScorerSpec(data_sources={"my/*": place}))


def test_a_users_function_gets_the_sample_and_its_own_arguments(users_file):
    path = users_file(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, weight):\n"
        "    return {'score': weight * len(solution_str), 'got': [data_source, ground_truth, extra_info['index']]}\n"
    )
    score, extra = make_scorer(ScorerSpec(path, kwargs={"weight": 0.5}))(SAMPLE)
    assert score == 3.0
    assert json.loads(extra) == {"got": ["openai/gsm8k", "7", 3]}


def test_a_users_file_may_import_its_neighbours_and_define_dataclasses(users_file):
    users_file("FACTOR = 4\n", "neighbour_of_my_reward.py")
    path = users_file(
        "from __future__ import annotations\nfrom dataclasses import dataclass\nfrom neighbour_of_my_reward import *\n"
        "@dataclass\nclass Pair:\n    a: int\n"
        "def score_it(**sample):\n    return Pair(2).a * FACTOR\n"
    )
    assert make_scorer(ScorerSpec(path, "score_it"))(SAMPLE) == (8.0, "{}")


@pytest.mark.parametrize(
    ("text", "name", "complaint"),
    [
        ("def compute_score(:\n", "compute_score", r"cannot be imported:(.|\n)*line 1(.|\n)*SyntaxError"),
        ("import no_such_module\n", "compute_score", r"cannot be imported:(.|\n)*No module named 'no_such_module'"),
        ("1 / 0\n", "compute_score", r"cannot be imported:(.|\n)*ZeroDivisionError"),
        ("import sys; sys.exit(2)\n", "compute_score", r"cannot be imported:(.|\n)*SystemExit: 2"),
        ("def compute_scores(**s): ...\n", "compute_score", r"name=compute_score; did you mean compute_scores\?"),
        ("def grade(**s): ...\ndef mark(**s): ...\n", "xyz", r"name=xyz; its functions: grade, mark"),
        ("compute_score = 3\n", "compute_score", r"has no function .*; its functions: none"),
        (
            "def compute_score(solution_str, ground_truth): ...\n",
            "compute_score",
            r"compute_score\(solution_str, ground_truth\) cannot be called with .*data_source.*unexpected keyword",
        ),
        (
            "def compute_score(data_source, solution_str, ground_truth, extra_info, scale): ...\n",
            "compute_score",
            r"reward_kwargs\): missing a required argument: 'scale'",
        ),
    ],
)
def test_a_users_function_that_cannot_be_had_is_an_error_that_says_why(users_file, text, name, complaint):
    with pytest.raises(UserError, match=complaint) as failure:
        make_scorer(ScorerSpec(users_file(text), name))
    assert "custom_reward_function.path=" in str(failure.value)


def test_a_file_that_is_missing_or_not_python_is_named(tmp_path, users_file):
    with pytest.raises(UserError, match=r"custom_reward_function\.path=.*gone\.py: no such file"):
        make_scorer(ScorerSpec(str(tmp_path / "gone.py")))
    with pytest.raises(UserError, match=r"notes\.txt is not a Python file"):
        make_scorer(ScorerSpec(users_file("hello", "notes.txt")))


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (1, 1.0),
        (True, 1.0),
        (-0.5, -0.5),
        (np.float32(0.25), 0.25),
        (torch.tensor(2.0), 2.0),
        ({"score": np.int64(3)}, 3.0),
    ],
)
def test_numbers_of_any_kind_are_scores(answer, score):
    assert parse(answer) == (score, "{}")


@pytest.mark.parametrize(
    "answer",
    [None, "1.0", math.nan, math.inf, np.nan, [1.0], torch.tensor([1.0]), (1.0, "ok"), {"score": None}, {"score": "x"}],
    ids=repr,
)
def test_what_is_no_finite_number_is_no_score(answer):
    with pytest.raises(ValueError, match="finite number"):
        parse(answer)


def test_a_dict_without_a_score_is_an_error_that_names_its_keys():
    with pytest.raises(ValueError, match=r"returned a dict without \"score\"; its keys: \['acc'\]$"):
        parse({"acc": 1.0})


def test_further_values_are_kept_as_json():
    extra = {
        "acc": np.float64(1.0),
        "pred": "7 ✓",
        "parts": {"a": (1, 2), 3: torch.tensor([1.5])},
        "nan": math.nan,
        "none": None,
        "other": 3j,
    }
    _, text = parse({"score": 1, **extra})
    assert json.loads(text) == {
        "acc": 1.0,
        "pred": "7 ✓",
        "parts": {"a": [1, 2], "3": [1.5]},
        "nan": None,
        "none": None,
        "other": "3j",
    }
