"""Scores of a file of responses: the estimates against counting, and the command line."""

from __future__ import annotations

import importlib.util
import itertools
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from verl.trainer import main_generation
from verl.trainer.evaluation.estimates import ALL, bootstrapped, pass_at_k, sizes_of, summarise
from verl.trainer.main_eval import main


@pytest.mark.parametrize("n", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_response(n):
    for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
        responses = [True] * correct + [False] * (n - correct)
        subsets = list(itertools.combinations(responses, k))
        assert pass_at_k(n, correct, k) == pytest.approx(np.mean([any(subset) for subset in subsets]), abs=1e-12)


def test_pass_at_k_of_many_responses_is_exact():
    assert pass_at_k(10_000, 1, 100) == pytest.approx(0.01, rel=1e-12)


def test_the_interval_of_a_share_is_the_textbooks():
    values = np.array([1.0] * 300 + [0.0] * 700)
    found = bootstrapped(values, draws=4000, confidence=0.95, seed=0)
    spread = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.3 - spread, abs=0.003)
    assert found.high == pytest.approx(0.3 + spread, abs=0.003)


def test_a_higher_confidence_gives_a_wider_interval_and_a_seed_the_same_one():
    values = np.random.default_rng(0).random(50)
    narrow, wide = (bootstrapped(values, 500, confidence, seed=3) for confidence in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.mean < narrow.high < wide.high
    assert bootstrapped(values, 500, 0.5, seed=3) == narrow != bootstrapped(values, 500, 0.5, seed=4)


def test_intervals_are_over_prompts_so_that_equal_responses_of_one_prompt_add_no_certainty():
    scores = np.random.default_rng(0).integers(0, 2, 40).astype(float).tolist()
    asked = {"sizes": [1], "draws": 300, "confidence": 0.9, "seed": 1}
    once = summarise(["s"] * 40, range(40), scores, [score == 1 for score in scores], **asked)["s"]
    repeated = [score for score in scores for _ in range(8)]
    groups = [group for group in range(40) for _ in range(8)]
    many = summarise(["s"] * 320, groups, repeated, [score == 1 for score in repeated], **asked)["s"]
    assert (many.prompts, many.responses) == (40, 320)
    assert many.estimates == once.estimates


def test_sources_are_summed_up_apart_and_together():
    sources, groups = ["a", "a", "a", "b", "b"], [0, 0, 1, 2, 2]
    scores, passed = [1.0, 0.0, 0.5, 2.0, 4.0], [True, False, False, True, True]
    found = summarise(sources, groups, scores, passed, sizes=[1, 2], draws=10, confidence=0.9, seed=0)
    assert list(found) == ["a", "b", ALL]
    means = {source: {name: each.mean for name, each in found[source].estimates.items()} for source in found}
    assert means["a"] == {"score": 0.5, "pass@1": 0.25, "pass@2": 1.0}  # the prompt with one response has no pass@2
    assert means["b"] == {"score": 3.0, "pass@1": 1.0, "pass@2": 1.0}
    assert means[ALL] == {"score": pytest.approx(4 / 3), "pass@1": 0.5, "pass@2": 1.0}


def test_by_default_k_doubles_up_to_all_responses():
    assert [sizes_of([], most) for most in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]
    assert sizes_of([3, 1, 3], 4) == [1, 3]


@pytest.fixture(scope="module")
def responses(small, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("responses") / "responses.parquet"
    settings = [f"data.path={small / 'train.parquet'}", f"data.output_path={path}", f"model.path={small / 'model'}"]
    settings += ["data.max_prompt_length=8", "data.max_response_length=12", "rollout.name=hf", "rollout.n=5"]
    assert main_generation.main(settings) == 0
    return path


def settings(responses: Path, small: Path, output: Path) -> list[str]:
    return [
        f"data.path={responses}",
        f"data.output_path={output}",
        f"custom_reward_function.path={small / 'reward.py'}",
        "reward.num_workers=1",
        "eval.pass_score=0.1",
    ]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_a_file_of_responses_gets_the_numbers_that_counting_gives(small, responses, tmp_path, capsys, suffix):
    table = pq.read_table(responses)
    if suffix == "jsonl":
        lines = [json.dumps(row) + "\n" for row in table.to_pylist()]
        (tmp_path / "responses.jsonl").write_text("".join(lines))
        responses = tmp_path / "responses.jsonl"
    assert main(settings(responses, small, tmp_path / "found.json")) == 0
    said = capsys.readouterr().out

    spec = importlib.util.spec_from_file_location("reward", small / "reward.py")
    reward = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reward)
    scores = np.array([[reward.compute_score("", text, "") for text in row] for row in table["responses"].to_pylist()])
    naive = {
        f"pass@{k}": np.mean([max(subset) >= 0.1 for row in scores for subset in itertools.combinations(row, k)])
        for k in (1, 2, 4, 5)
    }
    found = json.loads((tmp_path / "found.json").read_text())["sources"]["tests/letters"]
    assert (found["prompts"], found["responses"]) == (24, 120)
    assert found["estimates"].keys() == {"score", *naive}
    assert found["estimates"]["score"]["mean"] == pytest.approx(scores.mean())
    for name, value in naive.items():
        estimate = found["estimates"][name]
        assert estimate["mean"] == pytest.approx(value)
        assert f"{estimate['mean']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]" in said
    assert 0 < naive["pass@1"] < naive["pass@5"] < 1  # the numbers have something to tell


def test_the_scorers_acc_decides_what_passes(small, responses, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n"
        "    return {'score': -1.0, 'acc': extra_info['index'] < 6}\n"
    )
    chosen = [*settings(responses, tmp_path, tmp_path / "found.json"), "eval.pass_score=1", "eval.k=[2]"]
    assert main(chosen) == 0
    found = json.loads((tmp_path / "found.json").read_text())["sources"]["tests/letters"]["estimates"]
    assert {name: each["mean"] for name, each in found.items()} == {"score": -1.0, "pass@2": 0.25}


def test_responses_that_could_not_be_scored_are_counted_and_kept(small, responses, tmp_path, capsys):
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info):\n    return 1 / extra_info['index']\n"
    )
    output = tmp_path / "found.json"
    assert main(settings(responses, tmp_path, output)) == 0
    assert "5 of 120 samples could not be scored" in capsys.readouterr().out
    assert json.loads(output.read_text())["reward/errors"] == 5
    errors = [json.loads(line) for line in (tmp_path / "found.json.errors.jsonl").read_text().splitlines()]
    assert [error["response"] for error in errors] == pq.read_table(responses)["responses"][0].as_py()


def test_a_function_gets_the_further_arguments_that_it_wants(small, responses, tmp_path, capsys):
    (tmp_path / "reward.py").write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info, scale):\n    return scale\n"
    )
    chosen = settings(responses, tmp_path, tmp_path / "found.json")
    assert main([*chosen, "+custom_reward_function.reward_kwargs.scale=2.5"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())["sources"]["tests/letters"]["estimates"]
    assert found["score"]["mean"] == 2.5
    assert main(chosen) == 2
    assert "wants scale, which it is not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("setting", "code", "words"),
    [
        ("data.response_key=answers", 2, ["'answers'", "data.response_key"]),
        ("data.path=nowhere.jsonl", 2, ["data.path=nowhere.jsonl", "No such file"]),
        ("custom_reward_function.path=null", 2, ["tests/letters", "custom_reward_function.path=FILE.py"]),
        ("eval.k=[2,9]", 1, ["eval.k=[2, 9]", "the most is 5"]),
        ("eval.k=[0]", 2, ["eval.k"]),
        ("eval.confidence=1", 2, ["eval.confidence"]),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(small, responses, tmp_path, capsys, setting, code, words):
    assert main([*settings(responses, small, tmp_path / "found.json"), setting]) == code
    said = capsys.readouterr().err
    assert "Traceback" not in said
    for word in words:
        assert word in said


def test_a_row_without_responses_is_named(small, tmp_path, capsys):
    rows = [{"data_source": "x", "reward_model": {"ground_truth": "1"}, "responses": each} for each in (["a"], [])]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    assert main(settings(tmp_path / "in.parquet", small, tmp_path / "found.json")) == 1
    assert "in.parquet, row 1: column 'responses'" in capsys.readouterr().err
