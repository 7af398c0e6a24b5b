"""Checks of an evaluation before it starts, and its plan as text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from verl.checks.files import check_output_folder, check_parquet
from verl.checks.inert import Run, find_inert
from verl.checks.preflight import unexplained
from verl.checks.rewards import check_reward_function, check_scoring
from verl.findings import Findings
from verl.reward.scorers import ARGUMENTS

if TYPE_CHECKING:
    from verl.config.loading.load import Loaded
    from verl.config.sections.models import EvalConfig


def check(loaded: Loaded[EvalConfig], *, dry_run: bool) -> Findings:
    """All findings, problems of loading included. Does not use the network or import torch."""
    config, findings = loaded.draft, Findings(notices=list(loaded.notices))
    data, scorer = config.data, config.custom_reward_function
    columns = {
        data.response_key: "name the column of the responses in data.response_key",
        data.reward_fn_key: "name the column that says where a row is from in data.reward_fn_key",
        "reward_model.ground_truth": "the file needs its answers: generate from prompts that have them",
    }
    for file in data.path:
        if file.endswith(".jsonl"):
            _check_lines(findings, file, columns)
        else:
            check_parquet(findings, "data.path", file, columns)
    if scorer.path is None:
        parquet = [file for file in data.path if file.endswith(".parquet")]
        set_keys = loaded.set_keys if len(parquet) == len(data.path) else frozenset[str]()  # of lines only one is read
        check_scoring(findings, config.reward, {"data.path": parquet}, data.reward_fn_key, dry_run, set_keys)
    else:
        check_reward_function(findings, scorer.path, scorer.name, (*ARGUMENTS, *scorer.reward_kwargs))
    if data.output_path is not None:
        check_output_folder(findings, "data.output_path", str(Path(data.output_path).parent))
    findings.warnings += find_inert(Run(config, loaded.set_keys, device="cpu"))
    findings.problems = [*loaded.problems, *unexplained(findings.problems, loaded.problems)]
    return findings


def _check_lines(findings: Findings, file: str, columns: dict[str, str]) -> None:
    """Checks that the file exists and that its first line has the columns."""
    try:
        with Path(file).expanduser().open(encoding="utf-8") as lines:
            first = json.loads(next(lines, "{}"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or f"its first line is no JSON object ({error})"
        findings.problem("data.path", file, reason, "name a file that main_generation wrote")
        return
    for column, fix in columns.items():
        value = first
        for name in column.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value is None:
            findings.problem("data.path", file, f"its first line has no {column!r}", fix)


def plan_text(config: EvalConfig) -> str:
    scorer = config.custom_reward_function
    return "\n".join(
        [
            "Plan of the run",
            f"  responses   {', '.join(config.data.path)}",
            f"  scored by   {f'{scorer.path}:{scorer.name}' if scorer.path else 'the scorer of each data source'}",
            f"  written to  {config.data.output_path or 'the console only'}",
        ]
    )
