"""In which order responses are asked for, and in which they come back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.agent.single_turn import episodes_of, roll_out, with_results
from verl.rollout.contract.base import Capabilities, PromptWindow, Request, Result, SamplingParams


class Engine:
    """Answers with the prompt, last asked first. asked: the requests as they came."""

    def __init__(self, count: int, window: PromptWindow | None):
        self.capabilities = Capabilities(window=window)
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


def rolled_out(
    prompts: list[list[int]], n: int, window: PromptWindow | None
) -> tuple[list[Request], list[int], pa.Table, pa.Table]:
    """The requests, the rows in the order in which they ended, episodes and what became of them."""
    table = pa.table({"row": range(len(prompts)), "prompt_ids": prompts})
    table = table.append_column("images", pa.array([[]] * len(prompts), pa.list_(pa.string())))
    episodes = episodes_of(table, n=n, seed=0, step=1)
    ended: list[int] = []

    async def run() -> tuple[list[Request], pa.Table]:
        engine = Engine(episodes.num_rows, window)
        sampling = SamplingParams(max_new_tokens=4)
        return engine.asked, await roll_out(engine, episodes, sampling, lambda row, _: ended.append(row))

    asked, found = asyncio.run(run())
    return asked, ended, episodes, found


def runs_of(asked: list[Request], window: PromptWindow) -> list[list[Request]]:
    """The requests of each window: a prompt that none before had, and that has no room in the last, begins one."""
    runs: list[list[Request]] = []
    held: list[list[int]] = []
    for request in asked:
        prompt = list(request.prompt_ids)
        new = all(list(other.prompt_ids) != prompt for run in runs for other in run)
        if not runs or (new and (len(held) == window.prompts or sum(map(len, [*held, prompt])) > window.tokens)):
            runs.append([])
            held = []
        if prompt not in held:
            held.append(prompt)
        runs[-1].append(request)
    return runs


PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=3), min_size=1, max_size=6)
WINDOWS = st.builds(PromptWindow, tokens=st.integers(1, 12), prompts=st.integers(1, 4))


@given(PROMPTS, st.integers(1, 4), st.none() | WINDOWS)
def test_all_are_asked_for_and_come_back_in_their_rows_whatever_the_order(prompts, n, window):
    asked, ended, episodes, found = rolled_out(prompts, n, window)
    assert sorted(request.id for request in asked) == sorted(episodes["uid"].to_pylist())
    seeds = dict(zip(episodes["uid"].to_pylist(), episodes["seed"].to_pylist(), strict=True))
    assert all(request.sampling.seed == seeds[request.id] for request in asked)
    assert found["uid"] == episodes["uid"]
    assert found["response_ids"].to_pylist() == episodes["prompt_ids"].to_pylist()
    assert sorted(ended) == list(range(episodes.num_rows))


@given(PROMPTS, st.integers(1, 4), WINDOWS)
def test_in_a_window_every_prompt_is_asked_for_once_before_any_is_asked_for_again(prompts, n, window):
    asked, _, _, _ = rolled_out(prompts, n, window)
    for run in runs_of(asked, window):
        ids = [tuple(request.prompt_ids) for request in run]
        turns = [ids[:at].count(prompt) for at, prompt in enumerate(ids)]
        assert turns == sorted(turns)
        assert len(set(ids)) <= window.prompts
        assert sum(map(len, set(ids))) <= window.tokens or len(set(ids)) == 1
        for prompt in set(ids):  # all that is asked for of it
            assert ids.count(prompt) == n * sum(tuple(each) == prompt for each in prompts)


@pytest.mark.parametrize("window", [None, PromptWindow(2, 9), PromptWindow(9, 2)])
def test_windows_of_two_prompts_and_none(window):
    asked, _, _, _ = rolled_out([[1], [2], [3]], 2, window)
    found = [request.prompt_ids[0] for request in asked]
    assert found == ([1, 1, 2, 2, 3, 3] if window is None else [1, 2, 1, 2, 3, 3])


def test_prompts_that_are_all_different_are_asked_for_in_their_order():
    asked, ended, episodes, _ = rolled_out([[1], [2], [3]], 1, PromptWindow(2, 2))
    assert [request.id for request in asked] == episodes["uid"].to_pylist()
    assert ended == [2, 1, 0]


def test_each_token_has_the_version_of_the_weights_that_generated_it():
    episodes = pa.table({"uid": ["a", "b", "c"]})
    results = [
        Result("a", [5, 6, 7, 8], [0.0] * 4, "stop", [(3, 0), (4, 2), (6, 3)]),
        Result("b", [5, 6], [0.0] * 2, "length", [(4, 0)]),
        Result("c", [], [], "abort", []),
    ]
    table = with_results(episodes, results)
    assert table["versions"].to_pylist() == [[3, 3, 4, 6], [4, 4], []]
    assert table["first_version"].to_pylist() == [3, 4, 0]
    assert table["last_version"].to_pylist() == [6, 4, 0]
