"""Scores finished episodes in killable processes while other episodes are still being generated."""

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
from verl.reward.pool import CallResult, WorkerPool
from verl.reward.scorers import ScorerSpec, check_scorers, make_scorer, scorer_of, scorers_of, settings_of

if TYPE_CHECKING:
    from verl.config.sections.models import CustomRewardFunctionConfig, RewardConfig

log = logging.getLogger(__name__)


class RewardManager:
    """Scores responses with the scorer of their data source, or with the user's function.

    data_sources: all data sources of the run.
    batch: the user's function takes all samples of a step in one call.
    tokenizer: None if only texts are scored.
    error_log: a JSONL file that gets a line for every sample whose scoring failed.
    warn: called with a summary of the failures of a step.

    Raises UserError if a data source has no scorer, if a scorer cannot run on this machine, or if the user's function
    cannot be loaded.
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

    def submit(self, episode: Mapping[str, Any], response_ids: Sequence[int]) -> Future[CallResult]:
        """Start to score one response. Pass the returned future to ``collect``.

        episode: data_source, prompt, ground_truth and extra_info (JSON text). The value of the result is (score, JSON
        object of the scorer's other values)."""
        return self.submit_text(episode, self._decode(response_ids))

    def submit_text(self, episode: Mapping[str, Any], response: str) -> Future[CallResult]:
        """Like ``submit``, for a response as text."""
        sample = {name: episode[name] for name in ("data_source", "ground_truth", "extra_info")}
        sample["solution_str"] = response
        if self._judge and scorer_of(episode["data_source"], self._config.data_sources) == "judge":
            return self._judge.submit({**sample, "prompt": episode["prompt"]})
        assert self._pool is not None
        return self._pool.submit(sample)

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return decode(self._tokenizer, ids)

    def collect(self, table: pa.Table, futures: Sequence[Future[CallResult]]) -> tuple[pa.Table, dict[str, float]]:
        """The table with the columns ``score`` and ``reward_extra``, and metrics. Waits for all futures.

        A sample whose scoring failed gets ``reward.error_score`` and is logged. Raises UserError if the share of such
        samples exceeds ``reward.max_error_share``, or if the judge failed and ``reward.judge.on_failure=error``."""
        begun = time.monotonic()
        if isinstance(self._pool, BatchPool):
            self._pool.flush()
        results = [future.result() for future in futures]
        failed = [row for row, result in enumerate(results) if result.failure]
        if failed:
            self._report(table, results, failed)
        scores = [result.value or (self._config.error_score, "{}") for result in results]
        timeouts = sum(result.failure == "timeout" for result in results)
        metrics = {
            "reward/errors": float(len(failed) - timeouts),
            "reward/timeouts": float(timeouts),
            **hidden_time(results, begun),
        }
        table = with_columns(table, score=[score for score, _ in scores], reward_extra=[extra for _, extra in scores])
        return table, metrics

    def score_table(self, table: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """``submit`` every row, then ``collect``."""
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

    def _report(self, table: pa.Table, results: Sequence[CallResult], failed: list[int]) -> None:
        rows = table.take(pa.array(failed, pa.int64())).to_pylist()
        entries = [self._log_entry(row, results[index]) for row, index in zip(rows, failed, strict=True)]
        if self._error_log:
            try:
                self._error_log.parent.mkdir(parents=True, exist_ok=True)
                with self._error_log.open("a") as file:
                    file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
            except OSError as error:
                self._warn(f"{self._error_log} cannot be written: {error}")
        first = next((result for result in results if result.fatal), results[failed[0]])
        where = f" (all are in {self._error_log})" if self._error_log else ""
        detail = first.detail.strip().splitlines()[-1]
        summary = (
            f"{len(failed)} of {len(results)} samples could not be scored{where}. "
            f"Their score is {self._config.error_score}. First failure ({first.failure}): {detail}"
        )
        if first.fatal:
            raise UserError(
                f"{summary}\nreward.judge.on_failure=error stops the run. With error_score it would continue."
            )
        if len(failed) > self._config.max_error_share * len(results):
            raise UserError(f"{summary}\nThis exceeds reward.max_error_share={self._config.max_error_share}.")
        self._warn(summary)

    def _log_entry(self, row: dict[str, Any], result: CallResult) -> dict[str, Any]:
        return {
            "uid": row.get("uid"),
            "failure": result.failure,
            "detail": result.detail,
            "data_source": row["data_source"],
            "prompt": json.loads(row["prompt"]),
            "response": row["response"] if "response" in row else self._decode(row["response_ids"]),
            "ground_truth": row["ground_truth"],
        }


def hidden_time(results: Sequence[CallResult], collected: float) -> dict[str, float]:
    """Metrics: seconds of scoring summed over all samples, and the part before ``collected``, which did not delay the
    run."""
    spent = sum(result.ended - result.begun for result in results)
    hidden = sum(max(0.0, min(result.ended, collected) - result.begun) for result in results)
    return {"timing_sum_s/reward_scoring": spent, "timing_sum_s/reward_hidden": hidden}
