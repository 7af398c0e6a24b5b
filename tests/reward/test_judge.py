"""A judge behind a real HTTP server, which answers well, late, wrongly or not at all."""

from __future__ import annotations

import json
import sqlite3
import threading

import pytest
from judge_server import JudgeServer, completion, serving

from verl.config.sections.models import CustomRewardFunctionConfig, JudgeConfig, RewardConfig
from verl.errors import UserError
from verl.reward.judge import TEMPLATE, fill, missing
from verl.reward.judge_client import Judge
from verl.reward.manager import RewardManager


@pytest.fixture
def server():
    with serving() as judge:
        yield judge


@pytest.fixture
def judge_of(server):
    """judge_of(settings...) -> Judge of the server, closed at the end."""
    made = []

    def make(**settings) -> Judge:
        made.append(Judge(JudgeConfig(**{"url": server.url, "model": "some-model", "backoff": 0.0, **settings})))
        return made[-1]

    yield make
    for judge in made:
        judge.close()


def sample(response: str = "blue", truth: str = "grey") -> dict[str, str]:
    prompt = json.dumps([{"role": "user", "content": "Which colour?"}])
    return {"data_source": "x", "prompt": prompt, "solution_str": response, "ground_truth": truth, "extra_info": "{}"}


def outcome_of(judge: Judge, response: str = "blue"):
    return judge.submit(sample(response)).result(60)


def answers(*given):
    """An answer that is each of these in turn, the last one for ever."""
    left = list(given)
    return lambda body: left.pop(0) if len(left) > 1 else left[0]


def test_a_response_gets_the_number_that_the_judge_says(server: JudgeServer, judge_of):
    server.answer = lambda body: completion("Score: 3 was my first thought, but no.\nScore: 7.5")
    outcome = outcome_of(judge_of(temperature=0.5, max_tokens=12))
    assert outcome.value[0] == 7.5
    assert "first thought" in json.loads(outcome.value[1])["judge"]
    (body,) = server.asked
    assert body == {
        "model": "some-model",
        "messages": [{"role": "user", "content": fill(TEMPLATE, sample())}],
        "temperature": 0.5,
        "max_tokens": 12,
    }
    for text in ("Which colour?", "blue", "grey"):
        assert text in body["messages"][0]["content"]


def test_texts_are_filled_in_as_they_are():
    assert fill("{response} {x} {ground_truth}", sample("{prompt}", "\\1")) == "{prompt} {x} \\1"
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}]
    assert fill("{prompt}", {**sample(), "prompt": json.dumps(messages)}) == "system: Be kind.\n\nuser: Hi"


@pytest.mark.parametrize(
    "bad",
    [
        (429, {"Retry-After": "0"}, "slow down"),
        (500, {}, "oh"),
        (503, {}, ""),
        (200, {}, "not json"),
        (200, {"Content-Type": "application/json"}, "not json"),
        (200, {"Content-Type": "text/html"}, "<p>Bad gateway</p>"),
        (200, {}, "[]"),
        (200, {}, json.dumps({"choices": []})),
        (200, {}, json.dumps({"choices": [{"message": {"content": None}}]})),
        completion("I will not say."),
        completion("Score: 11"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(server, judge_of, bad):
    server.answer = answers(bad, bad, completion("Score: 4"))
    assert outcome_of(judge_of(retries=2)).value[0] == 4.0
    assert len(server.asked) == 3


def test_without_a_key_no_authorization_is_sent(server, judge_of, monkeypatch):
    for variable in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(variable, "of-another-service")
    assert outcome_of(judge_of()).value[0] == 5.0
    assert server.keys == [None]


def test_what_does_not_pass_is_a_failure_that_says_what_came(server, judge_of):
    server.answer = answers((500, {}, "out of memory"))
    outcome = outcome_of(judge_of(retries=2))
    assert (outcome.failure, outcome.value, len(server.asked)) == ("error", None, 3)
    assert outcome.detail == f"reward.judge.url={server.url}: status 500 out of memory (tried 3 times)"


def test_a_refusal_is_not_tried_again(server, judge_of):
    server.answer = answers((401, {}, "who are you?"))
    outcome = outcome_of(judge_of())
    assert (outcome.failure, len(server.asked)) == ("error", 1)
    assert "status 401 who are you?" in outcome.detail


def test_an_answer_that_does_not_come_in_time_is_tried_again(server, judge_of):
    hold = threading.Event()

    def answer(body):
        if len(server.asked) == 1:
            hold.wait(60)
        return completion("Score: 2")

    server.answer = answer
    assert outcome_of(judge_of(timeout=0.5, retries=1)).value[0] == 2.0
    hold.set()


def test_no_server_is_a_failure(judge_of):
    outcome = outcome_of(judge_of(url="http://127.0.0.1:9/v1", retries=1))
    assert outcome.failure == "error"
    assert "ConnectError" in outcome.detail
    assert "(tried 2 times)" in outcome.detail


def test_as_many_questions_at_a_time_as_allowed(server, judge_of):
    full = threading.Barrier(3)

    def answer(body):
        full.wait(60)  # no answer before three ask
        return completion("Score: 1")

    server.answer = answer
    judge = judge_of(concurrency=3)
    futures = [judge.submit(sample(str(number))) for number in range(9)]
    assert [future.result(60).value[0] for future in futures] == [1.0] * 9
    assert server.most == 3


def test_an_answer_is_kept_for_the_same_question_to_the_same_model(server, judge_of, tmp_path):
    cache = str(tmp_path / "deep" / "answers.sqlite")
    server.answer = lambda body: completion(f"Score: {len(server.asked)}")
    assert outcome_of(judge_of(cache=cache)).value[0] == 1.0
    again = judge_of(cache=cache)  # another run
    assert [outcome_of(again).value[0], outcome_of(again, "green").value[0]] == [1.0, 2.0]
    assert outcome_of(judge_of(cache=cache, model="other")).value[0] == 3.0
    assert outcome_of(judge_of(cache=cache, pattern=r"S(\d)", retries=0)).failure == "error"  # cannot be read any more
    assert len(server.asked) == 4


def test_only_answers_with_a_score_are_kept(server, judge_of, tmp_path):
    cache = tmp_path / "answers.sqlite"
    server.answer = answers(completion("hm"))
    assert outcome_of(judge_of(cache=str(cache), retries=1)).failure == "error"
    assert sqlite3.connect(cache).execute("SELECT count(*) FROM answers").fetchone() == (0,)


def test_a_cache_that_cannot_be_used_is_told_of_at_once(judge_of, tmp_path):
    (tmp_path / "notes.txt").write_text("These are notes and no data base, whatever one takes them for." * 20)
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "notes.txt" / "answers"):
        with pytest.raises(UserError, match=r"reward\.judge\.cache="):
            judge_of(cache=str(path))


def test_the_key_goes_to_the_server_and_nowhere_else(server, judge_of, monkeypatch, tmp_path):
    monkeypatch.setenv("JUDGE_KEY", "top-secret")
    server.answer = answers((401, {}, "no such key: Bearer top-secret"))
    judge = judge_of(api_key_env="JUDGE_KEY", cache=str(tmp_path / "cache"))
    outcome = outcome_of(judge)
    server.answer = answers(completion("Score: 1"))
    outcome_of(judge)
    assert server.keys == ["Bearer top-secret"] * 2
    assert "no such key: Bearer ***" in outcome.detail
    assert "top-secret" not in repr(RewardConfig(judge=JudgeConfig(api_key_env="JUDGE_KEY")).model_dump())
    assert b"top-secret" not in (tmp_path / "cache").read_bytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": None}, "a judge scores a data source of this run: set reward.judge.url"),
        ({"model": None}, "a judge scores a data source of this run: set reward.judge.model"),
        (
            {"url": "10.0.0.7:8000/v1"},
            "reward.judge.url=10.0.0.7:8000/v1 is not a web address: set it to http://HOST:PORT/v1, for example",
        ),
        (
            {"url": "http://x:port/v1"},
            "reward.judge.url=http://x:port/v1 is not a web address: set it to http://HOST:PORT/v1, for example",
        ),
        (
            {"api_key_env": "NO_SUCH_KEY"},
            "reward.judge.api_key_env=NO_SUCH_KEY, but this environment variable is not set: export NO_SUCH_KEY=...",
        ),
        ({"lowest": 10.0}, "reward.judge.lowest=10 is not below highest=10: raise highest"),
        (
            {"pattern": "("},
            "reward.judge.pattern is not a regular expression "
            "(missing ), unterminated subpattern at position 0): correct it",
        ),
        (
            {"pattern": r"\d"},
            "reward.judge.pattern has 0 groups: put parentheses around the number and nothing else",
        ),
        ({"template": "How good?"}, "reward.judge.template lacks the response: put {response} into it"),
    ],
    ids=str,
)
def test_unusable_settings_stop_the_run_before_anything_is_asked(settings, message, server, tokenizer):
    config = RewardConfig(judge=JudgeConfig(**{"url": server.url, "model": "m", **settings}))
    with pytest.raises(UserError) as error:
        RewardManager(config, CustomRewardFunctionConfig(), tokenizer, data_sources=["judge"])
    assert str(error.value) == message
    assert not server.asked


def test_a_missing_openai_package_stops_the_run_and_names_the_extra(server, tokenizer, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = RewardConfig(judge=JudgeConfig(url=server.url, model="m"))
    with pytest.raises(UserError, match=r'^the judge needs the package openai: run pip install -e "\.\[judge\]"$'):
        RewardManager(config, CustomRewardFunctionConfig(), tokenizer, data_sources=["judge"])


def test_a_judge_with_all_it_needs_lacks_nothing():
    assert missing(**JudgeConfig(url="http://x/v1", model="m").model_dump()) is None


# ---- as part of a run's rewards


@pytest.fixture
def manager_of(server, tokenizer, tmp_path):
    made = []

    def make(sources=("judge", "openai/gsm8k"), **settings) -> RewardManager:
        judge = JudgeConfig(url=server.url, model="m", backoff=0.0, retries=1, **settings)
        config = RewardConfig(judge=judge, num_workers=1, max_error_share=1.0, error_score=-1.0)
        log = tmp_path / "reward_errors.jsonl"
        none = CustomRewardFunctionConfig()
        made.append(RewardManager(config, none, tokenizer, data_sources=sources, error_log=log))
        return made[-1]

    yield make
    for manager in made:
        manager.close()


def test_judge_and_scorers_score_the_rows_of_their_data_sources(manager_of, table_of, server):
    server.answer = lambda body: completion("Score: 6" if "blue" in body["messages"][0]["content"] else "Score: 1")
    table = table_of(["#### 1", "blue", "red"], source=["openai/gsm8k", "judge", "judge"])
    scored, metrics = manager_of().score_table(table)
    assert scored["score"].to_pylist() == [1.0, 6.0, 1.0]
    assert metrics["reward/errors"] == 0.0
    assert metrics["timing_sum_s/reward_scoring"] > 0


def test_a_judge_that_fails_ends_the_run_unless_told_otherwise(manager_of, table_of, server):
    server.answer = lambda body: (500, {}, "") if "blue" in body["messages"][0]["content"] else completion("Score: 1")
    table = table_of(["blue", "red"], source=["judge"] * 2)
    with pytest.raises(UserError, match=r"status 500(.|\n)*reward\.judge\.on_failure=error stops the run"):
        manager_of(["judge"]).score_table(table)
    scored, metrics = manager_of(["judge"], on_failure="error_score").score_table(table)
    assert scored["score"].to_pylist() == [-1.0, 1.0]
    assert metrics["reward/errors"] == 1.0
