"""A response is scored as soon as it is there, while others are still being generated."""

from __future__ import annotations

import asyncio
import json
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest

from verl.data.schema import with_columns
from verl.reward.manager import hidden_time
from verl.reward.pool import Outcome
from verl.rollout.contract.base import Capabilities, Request, Result, SamplingParams
from verl.rollout.loop import EventLoop
from verl.trainer.ppo.responder import Responder
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog

USERS = """
from pathlib import Path

def compute_score(data_source, solution_str, ground_truth, extra_info, folder):
    (Path(folder) / solution_str).touch()
    return float(solution_str)
"""


class Engine:
    """Draws the response n of episode n; that of the last one only when all others have been scored."""

    capabilities = Capabilities(holds_weights=True)

    def __init__(self, tokenizer, count: int, scored: Path):
        self.tokenizer, self.count, self.scored = tokenizer, count, scored

    async def generate(self, requests: list[Request]) -> list[Result]:
        (request,) = requests
        number = int(request.id)
        while number == self.count - 1 and len(list(self.scored.iterdir())) < number:
            await asyncio.sleep(0.01)
        ids = self.tokenizer(str(number))["input_ids"]
        return [Result(request.id, ids, [0.0] * len(ids), "stop", [(0, len(ids))])]


@contextmanager
def stage(name: str, total: int | None = None):
    yield SimpleNamespace(advance=lambda tokens: None)


@pytest.mark.timeout(120)  # of a trainer that scores when all have been generated
def test_scores_are_there_before_the_last_response_is(manager_of, tokenizer, tmp_path, request):
    count, scored = 5, tmp_path / "scored"
    scored.mkdir()
    loop, log = EventLoop(), StepLog()
    request.addfinalizer(loop.close)
    engine = Engine(tokenizer, count, scored)
    runtime = Runtime(loop, None, engine, lambda: (), SimpleNamespace(stage=stage))  # type: ignore[arg-type]
    responder = Responder(Stages(runtime), None, manager_of(USERS, {"folder": str(scored)}), None)  # type: ignore[arg-type]
    episodes = with_columns(
        pa.table({"row": pa.array(range(count), pa.int64())}),
        data_source=["any"] * count,
        prompt=[json.dumps([])] * count,
        ground_truth=[""] * count,
        extra_info=["{}"] * count,
        prompt_ids=[[1]] * count,
        images=[[]] * count,
        uid=[str(number) for number in range(count)],
        seed=[0] * count,
    )
    table = responder.respond(episodes, SamplingParams(max_new_tokens=4), log)
    assert table["score"].to_pylist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    found = log.metrics
    assert 0 < found["timing_sum_s/reward_hidden"] <= found["timing_sum_s/reward_scoring"]


def test_time_is_hidden_as_far_as_it_passed_before_the_scores_were_asked_for():
    outcomes = [Outcome(begun=1.0, ended=3.0), Outcome(begun=4.0, ended=9.0), Outcome(begun=6.0, ended=8.0)]
    assert hidden_time(outcomes, 5.0) == {"timing_sum_s/reward_scoring": 9.0, "timing_sum_s/reward_hidden": 3.0}
