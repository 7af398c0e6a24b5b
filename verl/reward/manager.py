"""Scores for finished episodes: each sample in a killable process, while others are still being generated."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.data.schema import with_columns
from verl.data.tokenizer import decode
from verl.errors import UserError
from verl.reward.pool import Outcome, WorkerPool
from verl.reward.scorers import SCORERS, ScorerSpec, check_data_sources, make_scorer

if TYPE_CHECKING:
    from verl.config.models import CustomRewardFunctionConfig, RewardConfig

log = logging.getLogger(__name__)


class RewardManager:
    """Scores responses with the data source's scorer, or with the user's function.

    data_sources: all that will be scored; UserError at once for one without a scorer, as for a user's function that
    cannot be loaded. tokenizer: None where only texts are scored. error_log: a jsonl file; every sample that could not
    be scored is added to it. warn: told of them.
    """

    def __init__(
        self,
        config: RewardConfig,
        custom: CustomRewardFunctionConfig,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        data_sources: Iterable[str],
        error_log: Path | None = None,
        warn: Callable[[str], None] = log.warning,
    ):
        self._config, self._tokenizer, self._error_log, self._warn = config, tokenizer, error_log, warn
        if custom.path:
            path = str(Path(custom.path).expanduser().absolute())
            spec = ScorerSpec(path, custom.name, dict(custom.reward_kwargs))
        else:
            check_data_sources(set(data_sources))
            spec = ScorerSpec(kwargs={name: getattr(config, name).model_dump() for name in SCORERS})
        self._pool = WorkerPool(make_scorer, [spec], workers=config.num_workers, timeout=config.timeout)

    def submit(self, episode: Mapping[str, Any], response_ids: Sequence[int]) -> Future[Outcome]:
        """Begin to score one response. episode: its data_source, ground_truth and extra_info (JSON text).

        The outcome's value is (score, JSON object of the scorer's other values); give it to ``collect``."""
        return self.submit_text(episode, self._decode(response_ids))

    def submit_text(self, episode: Mapping[str, Any], response: str) -> Future[Outcome]:
        """As ``submit``."""
        return self._pool.submit(
            {
                "data_source": episode["data_source"],
                "solution_str": response,
                "ground_truth": episode["ground_truth"],
                "extra_info": episode["extra_info"],
            }
        )

    def _decode(self, ids: Sequence[int]) -> str:
        assert self._tokenizer is not None
        return decode(self._tokenizer, ids)

    def collect(self, table: pa.Table, futures: Sequence[Future[Outcome]]) -> tuple[pa.Table, dict[str, float]]:
        """Wait for the scores of the table's rows; add ``score`` and ``reward_extra``. Also metrics.

        A sample that could not be scored gets ``reward.error_score`` and is logged; UserError when more than
        ``reward.max_error_share`` of the rows are such."""
        outcomes = [future.result() for future in futures]
        failed = [row for row, outcome in enumerate(outcomes) if outcome.failure]
        if failed:
            self._report(table, outcomes, failed)
        scores = [outcome.value or (self._config.error_score, "{}") for outcome in outcomes]
        timeouts = sum(outcome.failure == "timeout" for outcome in outcomes)
        metrics = {"reward/errors": float(len(failed) - timeouts), "reward/timeouts": float(timeouts)}
        table = with_columns(table, score=[score for score, _ in scores], reward_extra=[extra for _, extra in scores])
        return table, metrics

    def score_table(self, table: pa.Table) -> tuple[pa.Table, dict[str, float]]:
        """``submit`` for every row, then ``collect``."""
        rows = table.select(["data_source", "ground_truth", "extra_info", "response_ids"]).to_pylist()
        return self.collect(table, [self.submit(row, row["response_ids"]) for row in rows])

    def close(self) -> None:
        self._pool.close()

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
        first = outcomes[failed[0]]
        where = f"; all are in {self._error_log}" if self._error_log else ""
        summary = (
            f"{len(failed)} of {len(outcomes)} samples could not be scored and get {self._config.error_score}{where}. "
            f"The first ({first.failure}): {first.detail.strip().splitlines()[-1]}"
        )
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
