"""reward_model.reward_manager=batch: one call of the user's function with lists."""

from __future__ import annotations

import json

import pytest

from verl.config.sections.models import CustomRewardFunctionConfig, RewardConfig
from verl.errors import UserError
from verl.reward.manager import RewardManager

USERS = """
calls = 0

def compute_score(data_sources, solution_strs, ground_truths, extra_infos, factor=1.0):
    global calls
    calls += 1
    if "raise" in solution_strs:
        raise RuntimeError("not like this")
    best = max(map(float, solution_strs))
    assert ground_truths == ["1"] * len(solution_strs) and data_sources == ["any"] * len(solution_strs)
    pairs = zip(solution_strs, extra_infos)
    scores = [{"score": factor * float(text) / best, "row": extra["row"], "call": calls} for text, extra in pairs]
    return scores[:-1] if "2" in solution_strs else scores
"""


@pytest.fixture
def manager_of(tokenizer, tmp_path):
    made = []

    def make(users: str = USERS, kwargs: dict | None = None, **settings) -> RewardManager:
        (tmp_path / "users.py").write_text(users)
        custom = CustomRewardFunctionConfig(path=str(tmp_path / "users.py"), reward_kwargs=kwargs or {})
        made.append(RewardManager(RewardConfig(**settings), custom, tokenizer, data_sources=["any"], batch=True))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def test_the_function_gets_all_samples_at_once_in_the_order_in_which_they_ended(manager_of, table_of):
    manager, table = manager_of(kwargs={"factor": 2.0}), table_of(["4", "1", "8"], source="any")
    rows = table.to_pylist()
    futures = {index: manager.submit(rows[index], rows[index]["response_ids"]) for index in (2, 0, 1)}
    scored, metrics = manager.collect(table, [futures[index] for index in range(3)])
    assert scored["score"].to_pylist() == [1.0, 0.25, 2.0]
    assert [json.loads(text) for text in scored["reward_extra"].to_pylist()] == [
        {"row": n, "call": 1} for n in range(3)
    ]
    assert metrics["timing_sum_s/reward_hidden"] == 0.0
    again, _ = manager.score_table(table)
    assert json.loads(again["reward_extra"][0].as_py())["call"] == 2


@pytest.mark.parametrize(
    ("responses", "complaint"),
    [(["1", "raise"], "RuntimeError: not like this"), (["1", "2", "3"], "returned 2 scores for 3 samples")],
)
def test_a_call_that_fails_fails_for_every_sample(manager_of, table_of, responses, complaint):
    with pytest.raises(
        UserError, match=f"{len(responses)} of {len(responses)} samples could not be scored.*{complaint}"
    ):
        manager_of().score_table(table_of(responses, source="any"))


def test_a_table_without_rows_is_no_call(manager_of, table_of):
    assert manager_of().score_table(table_of(["1"]).slice(0, 0))[0].num_rows == 0


def test_a_function_of_single_samples_is_refused_at_once(manager_of):
    with pytest.raises(UserError, match="cannot be called with the keyword arguments data_sources, solution_strs"):
        manager_of("def compute_score(data_source, solution_str, ground_truth, extra_info=None): return 1\n")
