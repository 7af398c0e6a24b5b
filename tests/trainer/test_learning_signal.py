"""Which steps have a learning signal, and what the warning about the others says."""

import json

import pyarrow as pa
import pytest

from verl.algorithms.advantages import resolve
from verl.config.sections.models import Config
from verl.trainer.ppo.learning_signal import ADVICE_AFTER, REMIND_EVERY, LearningSignal

GRPO, GAE, REMAX = map(resolve, ("grpo", "gae", "remax"))


def step_of(scores: list[list[float]], finish: str = "stop", **columns: list) -> pa.Table:
    """A step's table: the scores of the responses to each prompt."""
    flat = [score for group in scores for score in group]
    return pa.table(
        {
            "data_source": ["openai/gsm8k"] * len(flat),
            "ground_truth": ["42"] * len(flat),
            "group": pa.array([number for number, group in enumerate(scores) for _ in group], pa.int64()),
            "score": pa.array(flat, pa.float64()),
            "reward_extra": [json.dumps({"pred": None})] * len(flat),
            "response_ids": pa.array([[row, 7] for row in range(len(flat))], pa.list_(pa.int32())),
            "finish_reason": [finish] * len(flat),
            **columns,
        }
    )


def decode(rows: list[list[int]]) -> list[str]:
    return [f"I think\nit is {ids[0]}" for ids in rows]


def warn(table: pa.Table, estimator, step: int = 1) -> str | None:
    return LearningSignal(make_config(), estimator).warning(table, step, decode)


def make_config() -> Config:
    return Config.model_validate(KEYS)


KEYS = {
    "data": {"train_files": "train.parquet", "train_batch_size": 2},
    "actor_rollout_ref": {
        "model": {"path": "model"},
        "rollout": {"name": "hf"},
        "actor": {"ppo_mini_batch_size": 2},
    },
}


@pytest.mark.parametrize(
    ("scores", "estimator", "expected"),
    [
        ([[0, 0], [0, 0]], GRPO, False),
        ([[1, 1], [0, 0]], GRPO, False),  # prompts differ, but the responses to each do not
        ([[1, 0], [0, 0]], GRPO, True),
        ([[1], [0]], GRPO, True),  # a response that is alone keeps its reward
        ([[0], [0]], GRPO, False),
        ([[1, 1], [0, 0]], GAE, True),
        ([[1, 1], [1, 1]], GAE, False),
    ],
)
def test_rewards_that_an_estimator_does_not_tell_apart_are_warned_of(scores, estimator, expected):
    assert (warn(step_of(scores), estimator) is None) == expected


def test_remax_compares_with_the_greedy_response():
    assert warn(step_of([[1, 1], [0, 0]], greedy_reward=[1.0, 1.0, 0.0, 0.0]), REMAX) is not None
    assert warn(step_of([[1, 1], [0, 0]], greedy_reward=[0.0, 0.0, 0.0, 0.0]), REMAX) is None


def test_the_warning_shows_two_responses_and_what_the_scorer_looked_for():
    assert warn(step_of([[0, 0], [0, 0]]), GRPO, step=3) == (
        "step 3: no two responses to the same prompt have different rewards (all 4 are 0), "
        "so this step's update cannot learn from them.\n"
        '  the scorer gsm8k looks for the number behind the last "####" (reward.gsm8k.method=strict) '
        "or the last number (flexible)\n"
        "  response 1: reward 0, reference 42, no answer found, 2 tokens, ended by itself\n"
        "    > I think\n"
        "    > it is 0\n"
        "  response 2: reward 0, reference 42, no answer found, 2 tokens, ended by itself\n"
        "    > I think\n"
        "    > it is 2"
    )


def test_after_some_such_steps_in_a_row_the_run_says_what_to_try_and_seldom_again():
    signal, barren = LearningSignal(make_config(), GRPO), step_of([[0, 0], [0, 0]], finish="length")
    texts = [signal.warning(barren, step, decode) for step in range(1, ADVICE_AFTER + REMIND_EVERY + 1)]
    assert [index + 1 for index, text in enumerate(texts) if text] == [1, ADVICE_AFTER, ADVICE_AFTER + REMIND_EVERY]
    assert texts[ADVICE_AFTER - 1] == (
        "3 steps in a row had no differing rewards (all 4 are 0). What to try:\n"
        "  - 100% of the responses were cut off: raise data.max_response_length\n"
        "  - if responses hold the right answer in another form: show the form in the prompt, with an example line\n"
        "    (examples/data_preprocess/gsm8k.py --instruction), or relax the scorer (its settings under reward)\n"
        "  - if the answers are wrong: train on easier prompts, or fine-tune first (verl.trainer.main_sft)\n"
        "  - more responses to a prompt differ more often: raise actor_rollout_ref.rollout.n or temperature"
    )


def test_a_step_with_a_signal_begins_the_count_anew():
    signal, barren, good = LearningSignal(make_config(), GRPO), step_of([[0, 0]]), step_of([[1, 0]])
    steps = [barren, barren, good, barren]
    texts = [signal.warning(table, number, decode) for number, table in enumerate(steps, start=1)]
    assert [text is None for text in texts] == [False, True, True, False]


def test_where_all_are_right_the_data_are_too_easy():
    signal, easy = LearningSignal(make_config(), GRPO), step_of([[1, 1], [1, 1]])
    text = [signal.warning(easy, step, decode) for step in range(1, ADVICE_AFTER + 1)][-1]
    assert text == (
        "3 steps in a row had no differing rewards (all 4 are 1). What to try:\n"
        "  - if the responses are right, the data are too easy for this model: train on harder prompts\n"
        "  - more responses to a prompt differ more often: raise actor_rollout_ref.rollout.n or temperature"
    )
