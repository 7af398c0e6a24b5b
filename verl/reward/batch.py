"""Scores all samples of a step in one call of the user's function (reward_model.reward_manager=batch)."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from verl.reward.pool import CallResult, WorkerPool
from verl.reward.scorers import ScorerSpec, load_function, parse

ARGUMENTS = {
    "data_source": "data_sources",
    "solution_str": "solution_strs",
    "ground_truth": "ground_truths",
    "extra_info": "extra_infos",
}


class BatchPool:
    """Like ``WorkerPool``, but ``flush`` scores all samples in one call. timeout: seconds for that call."""

    def __init__(self, spec: ScorerSpec, *, timeout: float):
        self._pool = WorkerPool(make_batch_scorer, [spec], workers=1, timeout=timeout)
        self._samples: list[tuple[dict[str, Any], Future[CallResult]]] = []

    def submit(self, sample: dict[str, Any]) -> Future[CallResult]:
        future: Future[CallResult] = Future()
        self._samples.append((sample, future))
        return future

    def flush(self) -> None:
        """Score the collected samples in one call. If the call fails, each of its samples fails."""
        if not self._samples:
            return
        samples_and_futures, self._samples = self._samples, []
        result = self._pool.submit([sample for sample, _ in samples_and_futures]).result()
        for index, (_, future) in enumerate(samples_and_futures):
            future.set_result(result if result.failure else replace(result, value=result.value[index]))

    def close(self) -> None:
        self._pool.close()


def make_batch_scorer(spec: ScorerSpec) -> Callable[[list[dict[str, Any]]], list[tuple[float, str]]]:
    """A function from samples to (score, JSON object of the other values) of each sample.

    It calls the user's function with the lists named in ``ARGUMENTS``. The user's function returns a list of values as
    ``compute_score`` returns them."""
    function = load_function(spec, ARGUMENTS.values())

    def score(samples: list[dict[str, Any]]) -> list[tuple[float, str]]:
        read = [{**sample, "extra_info": json.loads(sample["extra_info"])} for sample in samples]
        lists = {plural: [sample[name] for sample in read] for name, plural in ARGUMENTS.items()}
        answers = list(function(**lists, **spec.kwargs))
        if len(answers) != len(samples):
            raise ValueError(f"the reward function returned {len(answers)} scores for {len(samples)} samples")
        return [parse(answer) for answer in answers]

    return score
