"""Scores a file of responses and summarises the scores."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from verl.config.loading.load import Loaded
from verl.config.sections.models import EvalConfig
from verl.findings import Findings
from verl.reward.manager import RewardManager
from verl.tracking import RunInfo, Trackers, build_trackers
from verl.tracking.files import written_whole
from verl.trainer.evaluation.estimates import Summary, sizes_of, summarise
from verl.trainer.evaluation.responses import read_responses
from verl.trainer.runs import say


def run(loaded: Loaded[EvalConfig], findings: Findings) -> int:
    """The exit code. findings: what the checks found, without a problem."""
    config = loaded.config
    assert config is not None
    say(findings)
    table = read_responses(config.data.path, config.data.response_key, config.data.reward_fn_key)
    sizes = sizes_of(config.eval.k, int(np.bincount(table["group"].to_numpy()).max()))
    with ExitStack() as stack:
        info = RunInfo("verl", "evaluation", Path(config.data.path[0]), total_steps=1)
        trackers = stack.enter_context(build_trackers(["console"], info))
        table, failures = score(stack, config, table, trackers)
    summaries = summarise(
        table["data_source"].to_pylist(),
        table["group"].to_pylist(),
        table["score"].to_pylist(),
        passed(table, config.eval.pass_score),
        sizes=sizes,
        draws=config.eval.bootstrap_samples,
        confidence=config.eval.confidence,
        seed=config.eval.seed,
    )
    print(table_text(summaries, config.eval.confidence))
    if config.data.output_path:
        path = Path(config.data.output_path).expanduser()
        found = {"sources": {source: asdict(each) for source, each in summaries.items()}, **failures}
        with written_whole(path) as partial:
            partial.write_text(json.dumps(found | {"settings": config.model_dump(mode="json")}, indent=1))
        print(f"The results are in {path}.")
    return 0


def score(
    stack: ExitStack, config: EvalConfig, table: pa.Table, trackers: Trackers
) -> tuple[pa.Table, dict[str, float]]:
    """The table with columns ``score`` and ``reward_extra``, and the number of responses that could not be scored."""
    path = config.data.output_path
    rewards = RewardManager(
        config.reward,
        config.custom_reward_function,
        None,
        data_sources=table["data_source"].unique().to_pylist(),
        error_log=Path(f"{path}.errors.jsonl").expanduser() if path else None,
        warn=trackers.progress.warn,
    )
    stack.callback(rewards.close)
    with trackers.progress.stage("reward", total=table.num_rows) as stage:
        futures = [rewards.submit_text(row, row["response"]) for row in table.to_pylist()]
        for future in futures:
            future.result()
            stage.advance()
        return rewards.collect(table, futures)


def passed(table: pa.Table, enough: float) -> list[bool]:
    """Whether each response's ``acc`` (its score if the scorer returns no ``acc``) is at least ``enough``."""
    accuracies = [json.loads(extra).get("acc") for extra in table["reward_extra"].to_pylist()]
    pairs = zip(accuracies, table["score"].to_pylist(), strict=True)
    return [(score if accuracy is None else accuracy) >= enough for accuracy, score in pairs]


def table_text(summaries: Mapping[str, Summary], confidence: float) -> str:
    """A table with one row per data source. Each number has its interval."""
    names = dict.fromkeys(name for summary in summaries.values() for name in summary.estimates)
    rows = [["data source", "prompts", "responses", *names]]
    for source, summary in summaries.items():
        cells = [summary.estimates.get(name) for name in names]
        numbers = [f"{cell.mean:.3f} [{cell.low:.3f}, {cell.high:.3f}]" if cell else "" for cell in cells]
        rows.append([source, f"{summary.prompts:,}", f"{summary.responses:,}", *numbers])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join([*lines, f"In brackets: {confidence:.0%} confidence intervals, from resampled prompts."])
