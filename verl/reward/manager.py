"""Scores for finished episodes: each sample in a killable process, while others are still being generated."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.data.schema import with_columns
from verl.data.tokenizer import decode
from verl.errors import UserError
from verl.reward.batch import BatchPool
from verl.reward.judge_client import Judge
from verl.reward.pool import Outcome, WorkerPool
from verl.reward.scorers import ScorerSpec, check_scorers, make_scorer, scorer_of, scorers_of, settings_of

if TYPE_CHECKING:
    from verl.config.sections.models import CustomRewardFunctionConfig, RewardConfig

log = logging.getLogger(__name__)


class RewardManager:
    """Scores responses with the data source's scorer, or with the user's function.

    data_sources: all that will be scored; UserError at once for one without a scorer, or whose scorer cannot run here,
    as for a user's function that cannot be loaded. batch: the user's function takes all of a step's samples in one
    call. tokenizer: None where only texts are scored. error_log: a jsonl file; every sample that could not be scored is
    added to it. warn: told of them.
    """

    def __init__(
        self,
        config: RewardConfig,
        custom: CustomRewardFunctionConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        data_sources: Iterable[str],
        batch: bool = False,
        error_log: Path | None = None,
        warn: Callable[[str], None] = log.warning,
    ):
        self._config, self._tokenizer, self._error_log, self._warn = config, tokenizer, error_log, warn
        self._pool: WorkerPool | BatchPool | None = None
        self._judge: Judge | None = None
        if custom.path:
            path = str(Path(custom.path).expanduser().absolute())
            spec = ScorerSpec(path, custom.name, dict(custom.reward_kwargs))
            self._pool = BatchPool(spec, timeout=config.timeout) if batch else self._pool_of(spec)
            return
        names, settings = scorers_of(data_sources, config.data_sources), settings_of(config)
        check_scorers(names, settings)
        if set(names) - {"judge"}:
            self._pool = self._pool_of(ScorerSpec(kwargs=settings, data_sources=config.data_sources))
        if "judge" in names:
            self._judge = Judge(config.judge)

    def _pool_of(self, spec: ScorerSpec) -> WorkerPool:
        return WorkerPool(make_scorer, [spec], workers=self._config.num_workers, timeout=self._config.timeout)

    def submit(self, episode: Mapping[str, Any], response_ids: Sequence[int]) -> Future[Outcome]:
        """Begin to score one response. episode: its data_source, prompt, ground_truth and extra_info (JSON text).

        The outcome's value is (score, JSON object of the scorer's other values); give it to ``collect``."""
        return self.submit_text(episode, self._decode(response_ids))

    def submit_text(self, episode: Mapping[str, Any], response: str) -> Future[Outcome]:
        """As ``submit``."""
        sample = {name: episode[name] for name in ("data_source", "ground_truth", "extra_info")}
        sample["solution_str"] = response
        if self._judge and scorer_of(episode["data_source"], self._config.data_sources) == "judge":
            return self._judge.submit({**sample, "prompt": episode["prompt"]})
        assert self._pool is not None
        return self._pool.submit(sample)

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return decode(self._tokenizer, ids)

    def collect(self, table: pa.Table, futures: Sequence[Future[Outcome]]) -> tuple[pa.Table, dict[str, float]]:
        """Wait for the scores of the table's rows; add ``score`` and ``reward_extra``. Also metrics.

        A sample that could not be scored gets ``reward.error_score`` and is logged; UserError when more than
        ``reward.max_error_share`` of the rows are such, or when the judge failed and ``reward.judge.on_failure`` says
        so."""
        begun = time.monotonic()
        if isinstance(self._pool, BatchPool):
            self._pool.flush()
        outcomes = [future.result() for future in futures]
        failed = [row for row, outcome in enumerate(outcomes) if outcome.failure]
        if failed:
            self._report(table, outcomes, failed)
        scores = [outcome.value or (self._config.error_score, "{}") for outcome in outcomes]
        timeouts = sum(outcome.failure == "timeout" for outcome in outcomes)
        metrics = {
            "reward/errors": float(len(failed) - timeouts),
            "reward/timeouts": float(timeouts),
            **hidden_time(outcomes, begun),
        }
        table = with_columns(table, score=[score for score, _ in scores], reward_extra=[extra for _, extra in scores])
        return table, metrics

    def score_table(self, table: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """``submit`` for every row, then ``collect``."""
        rows = table.select(["data_source", "prompt", "ground_truth", "extra_info", "response_ids"]).to_pylist()
        return self.collect(table, [self.submit(row, row["response_ids"]) for row in rows])

    def close(self) -> None:
        for part in (self._pool, self._judge):
            if part is not None:
                part.close()

    def __enter__(self) -> RewardManager:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _report(self, table: pa.Table, outcomes: Sequence[Outcome], failed: list[int]) -> None:
        rows = table.take(pa.array(failed, pa.int64())).to_pylist()
        entries = [self._entry(row, outcomes[index]) for row, index in zip(rows, failed, strict=True)]
        if self._error_log:
            try:
                self._error_log.parent.mkdir(parents=True, exist_ok=True)
                with self._error_log.open("a") as file:
                    file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            except OSError as error:
                self._warn(f"{self._error_log} could not be written: {error}")
        first = next((outcome for outcome in outcomes if outcome.fatal), outcomes[failed[0]])
        where = f"; all are in {self._error_log}" if self._error_log else ""
        summary = (
            f"{len(failed)} of {len(outcomes)} samples could not be scored and get {self._config.error_score}{where}. "
            f"The first ({first.failure}): {first.detail.strip().splitlines()[-1]}"
        )
        if first.fatal:
            raise UserError(f"{summary}\nreward.judge.on_failure=error ends the run; error_score would go on.")
        if len(failed) > self._config.max_error_share * len(outcomes):
            raise UserError(f"{summary}\nThat is over reward.max_error_share={self._config.max_error_share}.")
        self._warn(summary)

    def _entry(self, row: dict[str, Any], outcome: Outcome) -> dict[str, Any]:
        return {
            "uid": row.get("uid"),
            "failure": outcome.failure,
            "detail": outcome.detail,
            "data_source": row["data_source"],
            "prompt": json.loads(row["prompt"]),
            "response": row["response"] if "response" in row else self._decode(row["response_ids"]),
            "ground_truth": row["ground_truth"],
        }


def hidden_time(outcomes: Sequence[Outcome], collected: float) -> dict[str, float]:
    """Seconds spent on scoring, over all samples, and how many of them before the scores were asked for: those cost the
    run nothing."""
    spent = sum(outcome.ended - outcome.begun for outcome in outcomes)
    hidden = sum(max(0.0, min(outcome.ended, collected) - outcome.begun) for outcome in outcomes)
    return {"timing_sum_s/reward_scoring": spent, "timing_sum_s/reward_hidden": hidden}
