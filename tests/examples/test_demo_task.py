"""The demo's task: what its data sets share and what they must not, and a tokenizer that loads as it was saved."""

import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from verl.reward.gsm8k import compute_score

DEMO = Path(__file__).parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))  # its scripts import each other as scripts do

from make_data import MISREAD, draw_problem, make_splits, write_data  # noqa: E402
from make_model import make_model, make_tokenizer  # noqa: E402


@pytest.fixture(scope="module")
def splits():
    return make_splits(seed=3)


def is_right(problem) -> bool:
    return compute_score("verl/arithmetic", problem.answer, problem.ground_truth, {})["acc"] == 1.0


def test_no_test_problem_has_the_numbers_of_a_training_problem(splits):
    tested = {problem.numbers for problem in splits["test"]}
    assert len(tested) == len(splits["test"]) == 300
    for split in ("sft_train", "train"):
        assert not tested & {problem.numbers for problem in splits[split]}


def test_the_scorer_calls_every_answer_right_but_those_of_misread_worked_examples(splits):
    assert all(is_right(problem) for split in ("train", "test") for problem in splits[split])
    right = np.mean([is_right(problem) for problem in splits["sft_train"]])
    # Half of all verbs are unfamiliar; a problem has one or two, each as often.
    once = 1 - MISREAD / 2
    assert right == pytest.approx((once + once**2) / 2, abs=0.03)


def test_no_answer_is_much_more_frequent_than_others(splits):
    counts = np.unique([problem.ground_truth for problem in splits["test"]], return_counts=True)[1]
    assert counts.max() / len(splits["test"]) < 0.05


def test_the_data_is_a_function_of_the_seed(splits, tmp_path):
    assert make_splits(seed=3) == splits
    assert make_splits(seed=4)["test"] != splits["test"]
    write_data(tmp_path, seed=3)
    rows = pq.read_table(tmp_path / "test.parquet").to_pylist()
    assert [row["prompt"][0]["content"] for row in rows] == [problem.question for problem in splits["test"]]
    assert rows[0]["reward_model"] == {"style": "rule", "ground_truth": splits["test"][0].ground_truth}


def test_the_tokenizer_loads_beside_the_model_as_it_was_saved(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = make_tokenizer()
    made.save_pretrained(tmp_path)
    make_model(made, seed=1).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    random = np.random.default_rng(5)
    for text in (text for _ in range(200) for text in _texts(draw_problem(random))):
        ids = made(text)["input_ids"]
        assert loaded(text)["input_ids"] == ids
        assert loaded.decode(ids) == text
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert 500_000 <= model.num_parameters() <= 1_000_000
    assert model.config.vocab_size == len(loaded)


def test_each_digit_is_one_token():
    tokenizer = make_tokenizer()
    pieces = [tokenizer.decode([token]) for token in tokenizer("97-5=92")["input_ids"]]
    assert pieces == list("97-5=92")


def _texts(problem) -> tuple[str, str]:
    return problem.question, problem.answer
