from __future__ import annotations

import asyncio
import json
import logging

import pytest

from verl.config.sections.models import CustomRewardFunctionConfig, RewardConfig
from verl.data.schema import COLUMNS
from verl.errors import UserError
from verl.reward.manager import RewardManager

USERS = """
import os, time

def compute_score(data_source, solution_str, ground_truth, extra_info, factor=1.0):
    if solution_str == "raise":
        raise RuntimeError("cannot read this")
    if solution_str == "nan":
        return float("nan")
    if solution_str == "hang":
        time.sleep(1000)
    if solution_str == "die":
        os._exit(4)
    return {"score": factor * float(solution_str), "row": extra_info["row"], "truth": ground_truth}
"""


def test_a_table_gets_its_scores_and_the_scorers_other_values(manager_of, table_of):
    table = table_of(["#### 42", "#### 41", "42"], ["42"] * 3)
    scored, metrics = manager_of(gsm8k={"format_score": 0.1}).score_table(table)
    assert scored["score"].to_pylist() == [1.0, 0.1, 0.0]
    assert [json.loads(text) for text in scored["reward_extra"].to_pylist()] == [
        {"acc": 1.0, "pred": "42"},
        {"acc": 0.0, "pred": "41"},
        {"acc": 0.0, "pred": None},
    ]
    assert scored.schema.field("score").type == COLUMNS["score"]
    assert scored.select(table.column_names).equals(table)
    assert (metrics["reward/errors"], metrics["reward/timeouts"]) == (0.0, 0.0)


def test_episodes_are_scored_while_others_run_and_collected_in_the_tables_order(manager_of, table_of):
    manager, table = manager_of(USERS, {"factor": 2.0}), table_of([str(number) for number in range(100)])
    rows = table.to_pylist()

    async def episodes():
        async def episode(row: dict):
            await asyncio.sleep(0.001 * (len(rows) - row["row"]))  # the last ends first
            return manager.submit(row, row["response_ids"])

        return await asyncio.gather(*(episode(row) for row in rows))

    scored, _ = manager.collect(table, asyncio.run(episodes()))
    assert scored["score"].to_pylist() == [2.0 * number for number in range(100)]
    extras = [json.loads(text) for text in scored["reward_extra"].to_pylist()]
    assert extras == [{"row": row, "truth": "1"} for row in range(100)]


@pytest.mark.parametrize(
    ("bad", "failure", "detail", "metrics"),
    [
        ("raise", "error", "RuntimeError: cannot read this", (1.0, 0.0)),
        ("nan", "error", "finite number", (1.0, 0.0)),
        ("hang", "timeout", "took longer than 1 s", (0.0, 1.0)),
        ("die", "died", "exit code 4", (1.0, 0.0)),
    ],
)
def test_a_sample_that_cannot_be_scored_gets_the_error_score_and_is_logged_whole(
    manager_of, table_of, tmp_path, caplog, bad, failure, detail, metrics
):
    manager = manager_of(USERS, error_score=-1.0, timeout=1 if bad == "hang" else 20)
    responses = [str(number) for number in range(20)]
    responses[7] = bad
    with caplog.at_level(logging.WARNING):
        scored, counted = manager.score_table(table_of(responses))
    scores = scored["score"].to_pylist()
    assert scores[7] == -1.0
    assert scored["reward_extra"].to_pylist()[7] == "{}"
    assert scores[:7] + scores[8:] == [float(number) for number in range(20) if number != 7]
    assert (counted["reward/errors"], counted["reward/timeouts"]) == metrics
    (line,) = (tmp_path / "run/reward_errors.jsonl").read_text().splitlines()
    entry = json.loads(line)
    assert detail in entry.pop("detail")
    assert entry == {
        "uid": "1-7-0",
        "failure": failure,
        "data_source": "openai/gsm8k",
        "prompt": [{"role": "user", "content": "question 7"}],
        "response": bad,
        "ground_truth": "1",
    }
    (record,) = caplog.records
    assert "1 of 20 samples could not be scored" in record.message
    assert detail in record.message
    assert "reward_errors.jsonl" in record.message


def test_the_run_stops_when_more_than_the_allowed_share_fails(manager_of, table_of, tmp_path):
    manager = manager_of(USERS, max_error_share=0.2)
    manager.score_table(table_of(["1", "2", "3", "4", "raise"]))  # exactly a fifth
    with pytest.raises(UserError, match=r"2 of 5 samples could not be scored(.|\n)*reward\.max_error_share=0\.2"):
        manager.score_table(table_of(["1", "2", "3", "nan", "raise"]))
    assert len((tmp_path / "run/reward_errors.jsonl").read_text().splitlines()) == 3  # all are kept


def test_a_ground_truth_that_is_no_number_stops_the_run_and_says_so(manager_of, table_of):
    with pytest.raises(UserError, match="the ground truth 'x' is not a number"):
        manager_of().score_table(table_of(["#### 1"] * 3, ["x"] * 3))


def test_special_tokens_are_no_part_of_what_is_scored(manager_of, table_of):
    users = "def compute_score(solution_str, **rest):\n    return {'score': 0, 'text': solution_str}\n"
    scored, _ = manager_of(users).score_table(table_of(["  two  spaces . "]))
    assert json.loads(scored["reward_extra"][0].as_py()) == {"text": "  two  spaces . "}


def test_a_table_without_rows_is_scored(manager_of, table_of):
    scored, metrics = manager_of().score_table(table_of(["#### 1"]).slice(0, 0))
    assert scored.num_rows == 0
    assert scored["score"].type == COLUMNS["score"]
    assert metrics["reward/errors"] == 0.0


def test_a_users_function_with_an_error_is_refused_at_once(manager_of):
    with pytest.raises(UserError, match="SyntaxError"):
        manager_of("def compute_score(:\n")
    with pytest.raises(UserError, match="unexpected keyword argument 'nonsense'"):
        manager_of("def compute_score(data_source, solution_str, ground_truth, extra_info): ...\n", {"nonsense": 1})


def test_a_users_file_that_ends_its_process_is_refused_at_once(manager_of):
    with pytest.raises(UserError, match="could not start: its process ended with exit code 3"):
        manager_of("import os\nos._exit(3)\n")


def test_a_data_source_without_a_scorer_is_refused_at_once_unless_the_user_has_a_function(tokenizer, tmp_path):
    config, none = RewardConfig(num_workers=1), CustomRewardFunctionConfig()
    with pytest.raises(UserError, match=r"^the data source 'my/set' has no scorer"):
        RewardManager(config, none, tokenizer, data_sources=["openai/gsm8k", "my/set"])
    (tmp_path / "users.py").write_text("def compute_score(**sample):\n    return 1\n")
    custom = CustomRewardFunctionConfig(path=str(tmp_path / "users.py"))
    RewardManager(config, custom, tokenizer, data_sources=["my/set"]).close()


def test_a_relative_path_of_the_users_file_is_understood(manager_of, tokenizer, tmp_path, monkeypatch, table_of):
    (tmp_path / "mine.py").write_text(USERS)
    monkeypatch.chdir(tmp_path)
    custom = CustomRewardFunctionConfig(path="mine.py")
    with RewardManager(RewardConfig(num_workers=1), custom, tokenizer, data_sources=["x"]) as manager:
        scored, _ = manager.score_table(table_of(["5"]))
    assert scored["score"].to_pylist() == [5.0]
