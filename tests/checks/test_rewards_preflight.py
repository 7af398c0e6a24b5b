"""How responses will be scored, looked at before the run and without running the user's code."""

from __future__ import annotations

import inspect
from contextlib import nullcontext

import pytest

from verl.checks.rewards import check_reward_function
from verl.findings import Findings
from verl.reward.scorers import ARGUMENTS


def problems_of(path, name="compute_score"):
    findings = Findings()
    check_reward_function(findings, str(path), name, ARGUMENTS)
    return findings.problems


@pytest.mark.parametrize(
    "source",
    [
        "def compute_score(**kwargs):\n    return 1.0\n",
        "import nothing_of_this_name\ndef compute_score(**kwargs): return 1.0\n",
        "from elsewhere import score as compute_score\n",
        "compute_score = lambda **kwargs: 1.0\n",
        "from elsewhere import *\n",
        "try:\n    from fast import compute_score\nexcept ImportError:\n    from slow import compute_score\n",
    ],
)
def test_a_function_that_is_or_may_be_there_is_no_problem(tmp_path, source):
    (tmp_path / "reward.py").write_text(source)
    assert problems_of(tmp_path / "reward.py") == []


@pytest.mark.parametrize(
    ("parameters", "why"),
    [
        ("data_source, solution_str, ground_truth, extra_info", ""),
        ("solution_str, ground_truth, **rest", ""),
        ("solution_str, ground_truth, data_source=None, extra_info=None, *, scale=1.0", ""),
        ("solution_str, ground_truth", "is given data_source, extra_info, which it does not take"),
        ("data_source, solution_str, ground_truth, extra_info, scale", "wants scale, which it is not given"),
        ("data_source, solution_str, ground_truth, extra_info, *, scale", "wants scale, which it is not given"),
        ("text, /, **rest", "wants text, which it is not given"),
        ("text=None, /, **rest", ""),
    ],
)
def test_a_function_that_cannot_be_called_as_it_will_be_is_a_problem(tmp_path, parameters, why):
    """As Python itself sees it."""
    source = f"def compute_score({parameters}):\n    return 1.0\n"
    (tmp_path / "reward.py").write_text(source)
    assert [problem.why for problem in problems_of(tmp_path / "reward.py")] == ([f"it {why}"] if why else [])
    scope = {}
    exec(source, scope)
    signature = inspect.signature(scope["compute_score"])
    with nullcontext() if not why else pytest.raises(TypeError):
        signature.bind(data_source=1, solution_str=2, ground_truth=3, extra_info=4)
    (tmp_path / "reward.py").write_text(f"import functools\n@functools.cache\n{source}")
    assert problems_of(tmp_path / "reward.py") == []  # a decorator may change that


@pytest.mark.parametrize(
    ("after", "found"),
    [
        ("compute_score = wrap(compute_score)", 0),
        ("if True:\n    def compute_score(**all): return 1.0", 0),
        ("from elsewhere import *", 0),
        ("from elsewhere import score as compute_score", 0),
        ("if __name__ == '__main__':\n    print(compute_score(text=''))", 1),
        ("def other(**all): return compute_score", 1),
    ],
)
def test_of_a_name_that_is_given_twice_the_last_meaning_counts(tmp_path, after, found):
    (tmp_path / "reward.py").write_text(f"def compute_score(text):\n    return 1.0\n{after}\n")
    assert len(problems_of(tmp_path / "reward.py")) == found


def test_a_function_for_one_sample_is_not_one_for_all(checked, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None): ..."
    )
    keys = [f"custom_reward_function.path={tmp_path / 'reward.py'}"]
    assert checked(*keys)[1].problems == []
    (problem,) = checked(*keys, "reward_model.reward_manager=batch")[1].problems
    assert problem.why.startswith("it wants data_source, solution_str, ground_truth")
    (problem,) = checked(*keys, "+custom_reward_function.reward_kwargs.scale=2")[1].problems
    assert problem.why == "it is given scale, which it does not take"


def test_a_misspelt_function_gets_the_nearest_name(tmp_path):
    (tmp_path / "reward.py").write_text('"""Scores."""\nimport re\ndef compute_scores(**kwargs): return 1.0\n')
    (problem,) = problems_of(tmp_path / "reward.py")
    assert problem.key == "custom_reward_function.name"
    assert problem.fix == "set it to compute_scores"


@pytest.mark.parametrize("source", ["def compute_score(:\n", "\0"])
def test_a_file_that_is_not_python_is_a_problem(tmp_path, source):
    (tmp_path / "reward.py").write_text(source)
    (problem,) = problems_of(tmp_path / "reward.py")
    assert "not valid Python" in problem.why


def test_a_missing_file_is_a_problem(tmp_path):
    (problem,) = problems_of(tmp_path / "reward.py")
    assert problem.key == "custom_reward_function.path"


def test_a_data_source_without_scorer_is_a_problem_unless_the_user_scores(checked, make_parquet, tmp_path):
    data = f"data.train_files={make_parquet(tmp_path / 'x.parquet', 100, data_source='my/own')}"
    _, findings = checked(data)
    (problem,) = findings.problems
    assert problem.key == "data.train_files"
    assert "my/own" in problem.why
    (tmp_path / "reward.py").write_text("def compute_score(**kwargs): return 1.0\n")
    assert checked(data, f"custom_reward_function.path={tmp_path}/reward.py")[1].problems == []


def test_a_data_source_may_be_given_a_scorer_which_must_exist(checked, make_parquet, tmp_path):
    data = f"data.train_files={make_parquet(tmp_path / 'x.parquet', 100, data_source='my/own')}"
    assert checked(data, "reward.data_sources={my/*: exact_match}")[1].problems == []
    assert checked(data, "reward.data_sources={my/own: 'some.module:function'}")[1].problems == []
    (problem,) = checked(data, "reward.data_sources={my/own: exact_mach}")[1].problems
    assert problem.key == "reward.data_sources.my/own"
    assert problem.fix == "did you mean exact_match?"


def test_tests_of_code_must_fit_into_the_time_of_scoring_a_response(checked, make_parquet, tmp_path):
    data = f"data.train_files={make_parquet(tmp_path / 'x.parquet', 100, data_source='apps')}"
    assert checked(data)[1].problems == []
    (problem,) = checked(data, "reward.code.total_seconds=60")[1].problems
    assert (problem.key, problem.fix) == ("reward.timeout", "set it to 75, or those lower")


def test_scoring_in_batches_needs_a_function_of_the_users(checked, make_parquet, tmp_path):
    data = f"data.train_files={make_parquet(tmp_path / 'x.parquet', 100)}"
    (problem,) = checked(data, "reward_model.reward_manager=batch")[1].problems
    assert problem.key == "reward_model.reward_manager"


def test_a_judge_without_an_address_is_a_problem(checked, make_parquet, tmp_path):
    data = f"data.train_files={make_parquet(tmp_path / 'x.parquet', 100, data_source='judge')}"
    (problem,) = checked(data, "reward.judge.model=m")[1].problems
    assert (problem.key, problem.fix) == ("reward.data_sources.judge", "set reward.judge.url")


def test_a_key_of_a_scorer_that_scores_nothing_is_named(checked, make_parquet, tmp_path):
    data = f"data.train_files={make_parquet(tmp_path / 'x.parquet', 100, data_source='openai/gsm8k')}"
    keys = ["reward.gsm8k.method=flexible", "reward.json_match.format_score=0.5"]
    warnings = checked(data, *keys)[1].warnings
    assert [text for text in warnings if "json_match" in text] == [
        "reward.json_match.format_score has no effect: no data source of this run is scored by json_match "
        "(column 'data_source')."
    ]
    assert not [text for text in warnings if "gsm8k" in text]


def test_of_data_that_cannot_be_read_no_scorer_is_said_to_be_idle(checked, tmp_path):
    warnings = checked(f"data.train_files={tmp_path}/none.parquet", "reward.json_match.format_score=0.5")[1].warnings
    assert not [text for text in warnings if "json_match" in text]
