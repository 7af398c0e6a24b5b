"""Single-turn episodes: n responses to each prompt."""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
import pyarrow as pa

from verl.data.ragged import Ragged
from verl.data.schema import with_columns
from verl.rollout.contract.base import PromptWindow, Request, Result, RolloutEngine, SamplingParams


def episode_seed(*parts: object) -> int:
    """A 63-bit seed: a pure function of its parts, so that a resumed run generates the same responses."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def episodes_of(prompts: pa.Table, *, n: int, seed: int, step: int, draw: int = 0) -> pa.Table:
    """Each prompt's row n times in succession, with the episode's ``uid``, ``group`` and ``seed``.

    draw: number of the generation within the step. A prompt that comes again in the step gets other seeds."""
    count, name = prompts.num_rows, f"{step}.{draw}" if draw else f"{step}"
    table = prompts.take(pa.array([row for row in range(count) for _ in range(n)], pa.int64()))
    keys = [(row, sample) for row in prompts["row"].to_pylist() for sample in range(n)]
    return with_columns(
        table,
        uid=[f"{name}-{row}-{sample}" for row, sample in keys],
        group=[row for row, _ in keys],
        seed=[episode_seed(seed, step, row, sample, *([draw] if draw else [])) for row, sample in keys],
    )


def greedy_episodes_of(prompts: pa.Table, *, step: int) -> pa.Table:
    """One more episode of each prompt, for greedy sampling, which does not use the seed."""
    episodes = episodes_of(prompts, n=1, seed=0, step=step)
    return with_columns(episodes, uid=[f"{uid}-greedy" for uid in episodes["uid"].to_pylist()])


async def roll_out(
    engine: RolloutEngine,
    episodes: pa.Table,
    sampling: SamplingParams | Sequence[SamplingParams],
    on_finish: Callable[[int, Result], None] = lambda index, result: None,
) -> pa.Table:
    """The table with the trajectory columns: a response to every episode.

    Requests are sent in the order in which the engine computes prompts least often (``Capabilities.window``).
    sampling: for all episodes, or for each. on_finish: called with (row index, result) when an episode ends.
    """
    of_rows = [sampling] * episodes.num_rows if isinstance(sampling, SamplingParams) else sampling

    async def episode(index: int, uid: str, prompt_ids: list[int], seed: int, images: list[str]) -> Result:
        request = Request(uid, prompt_ids, replace(of_rows[index], seed=seed), tuple(images))
        (result,) = await engine.generate([request])
        on_finish(index, result)
        return result

    rows = list(zip(*(episodes[name].to_pylist() for name in ("uid", "prompt_ids", "seed", "images")), strict=True))
    window = engine.capabilities.window
    asked = range(len(rows)) if window is None else _in_windows([(ids, images) for _, ids, _, images in rows], window)
    answers = await asyncio.gather(*(episode(index, *rows[index]) for index in asked))
    results = dict(zip(asked, answers, strict=True))
    return with_results(episodes, [results[index] for index in range(len(rows))])


def _in_windows(prompts: Sequence[tuple[list[int], list[str]]], window: PromptWindow) -> list[int]:
    """Row numbers of these prompts (ids, images), window by window: the first row of each prompt, then the second."""
    alike: dict[tuple[tuple[int, ...], tuple[str, ...]], list[int]] = defaultdict(list)
    for row, (ids, images) in enumerate(prompts):
        alike[tuple(ids), tuple(images)].append(row)
    windows: list[list[list[int]]] = [[]]
    tokens = 0
    for (prompt, _), rows in alike.items():
        if windows[-1] and (tokens + len(prompt) > window.tokens or len(windows[-1]) == window.prompts):
            windows.append([])
            tokens = 0
        tokens += len(prompt)
        windows[-1].append(rows)
    return [row for each in windows for turn in zip_longest(*each) for row in turn if row is not None]


def with_results(episodes: pa.Table, results: list[Result]) -> pa.Table:
    ids = Ragged.from_rows([result.response_ids for result in results], "int32")
    return with_columns(
        episodes,
        response_ids=ids,
        response_mask=ids.like(np.ones(len(ids.values), "int8")),
        rollout_log_probs=Ragged.from_rows([result.log_probs for result in results], "float32"),
        finish_reason=[result.finish_reason for result in results],
        first_version=[result.weight_versions[0][0] if result.weight_versions else 0 for result in results],
        last_version=[result.weight_versions[-1][0] if result.weight_versions else 0 for result in results],
        versions=Ragged.from_rows([token_versions(result) for result in results], "int64"),
    )


def token_versions(result: Result) -> np.ndarray:
    """int64, shape (T,): the version of the weights that generated each token."""
    count = len(result.response_ids)
    versions = [version for version, _ in result.weight_versions] or [0]
    starts = [start for _, start in result.weight_versions] or [0]
    return np.repeat(np.array(versions, "int64"), np.diff([*starts, count]))
