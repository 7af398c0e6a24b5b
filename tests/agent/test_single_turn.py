"""In which order responses are asked for, and in which they come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from verl.agent.single_turn import episodes_of, roll_out
from verl.rollout.base import Request, Result, SamplingParams


class Engine:
    """Answers with the prompt, last asked first. asked: the requests as they came."""

    def __init__(self, count: int):
        self.asked: list[Request] = []
        self._all_there, self._count = asyncio.Event(), count

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        (request,) = requests
        self.asked.append(request)
        place = len(self.asked)
        if place == self._count:
            self._all_there.set()
        await self._all_there.wait()
        for _ in range(self._count - place):
            await asyncio.sleep(0)
        return [Result(request.id, list(request.prompt_ids), [0.0] * len(request.prompt_ids), "stop", [])]


def rolled_out(prompts: list[list[int]], n: int) -> tuple[list[Request], list[int], pa.Table, pa.Table]:
    """The requests, the rows in the order in which they ended, episodes and what became of them."""
    table = pa.table({"row": range(len(prompts)), "prompt_ids": prompts, "images": pa.array([[]] * len(prompts))})
    table = table.set_column(2, "images", table["images"].cast(pa.list_(pa.string())))
    episodes = episodes_of(table, n=n, seed=0, step=1)
    ended: list[int] = []

    async def run() -> tuple[list[Request], pa.Table]:
        engine = Engine(episodes.num_rows)
        sampling = SamplingParams(max_new_tokens=4)
        return engine.asked, await roll_out(engine, episodes, sampling, lambda row, _: ended.append(row))

    asked, found = asyncio.run(run())
    return asked, ended, episodes, found


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=6), st.integers(1, 4))
def test_every_prompt_is_asked_for_once_before_any_is_asked_for_again(prompts, n):
    asked, ended, episodes, found = rolled_out(prompts, n)
    turns = [sum(earlier.prompt_ids == each.prompt_ids for earlier in asked[:at]) for at, each in enumerate(asked)]
    assert turns == sorted(turns)
    assert sorted(request.id for request in asked) == sorted(episodes["uid"].to_pylist())
    seeds = dict(zip(episodes["uid"].to_pylist(), episodes["seed"].to_pylist(), strict=True))
    assert all(request.sampling.seed == seeds[request.id] for request in asked)
    assert found["uid"] == episodes["uid"]
    assert found["response_ids"].to_pylist() == episodes["prompt_ids"].to_pylist()
    assert sorted(ended) == list(range(episodes.num_rows))


def test_prompts_that_are_all_different_are_asked_for_in_their_order():
    asked, ended, episodes, _ = rolled_out([[1], [2], [3]], 1)
    assert [request.id for request in asked] == episodes["uid"].to_pylist()
    assert ended == [2, 1, 0]
