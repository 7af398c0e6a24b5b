"""All of a step's samples in one call of the user's function (reward_model.reward_manager=batch)."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from verl.reward.pool import Outcome, WorkerPool
from verl.reward.scorers import ScorerSpec, load_function, parse

ARGUMENTS = {
    "data_source": "data_sources",
    "solution_str": "solution_strs",
    "ground_truth": "ground_truths",
    "extra_info": "extra_infos",
}


class BatchPool:
    """Like ``WorkerPool``, but samples are gathered until ``flush``. timeout: seconds of the one call."""

    def __init__(self, spec: ScorerSpec, *, timeout: float):
        self._pool = WorkerPool(make_batch_scorer, [spec], workers=1, timeout=timeout)
        self._gathered: list[tuple[dict[str, Any], Future[Outcome]]] = []

    def submit(self, sample: dict[str, Any]) -> Future[Outcome]:
        future: Future[Outcome] = Future()
        self._gathered.append((sample, future))
        return future

    def flush(self) -> None:
        """Score what was gathered. What befalls the call befalls each of its samples."""
        if not self._gathered:
            return
        gathered, self._gathered = self._gathered, []
        outcome = self._pool.submit([sample for sample, _ in gathered]).result()
        for index, (_, future) in enumerate(gathered):
            future.set_result(outcome if outcome.failure else replace(outcome, value=outcome.value[index]))

    def close(self) -> None:
        self._pool.close()


def make_batch_scorer(spec: ScorerSpec) -> Callable[[list[dict[str, Any]]], list[tuple[float, str]]]:
    """samples -> (score, JSON object of the other values) of each. The function is called with lists, named as above,
    and returns a list of what ``compute_score`` returns."""
    function = load_function(spec, ARGUMENTS.values())

    def score(samples: list[dict[str, Any]]) -> list[tuple[float, str]]:
        read = [{**sample, "extra_info": json.loads(sample["extra_info"])} for sample in samples]
        lists = {plural: [sample[name] for sample in read] for name, plural in ARGUMENTS.items()}
        answers = list(function(**lists, **spec.kwargs))
        if len(answers) != len(samples):
            raise ValueError(f"the reward function returned {len(answers)} scores for {len(samples)} samples")
        return [parse(answer) for answer in answers]

    return score
