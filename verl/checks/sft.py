"""Checks of a supervised run before it starts, and its plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from verl.checks.files import check_output_folder, check_parquet, paths
from verl.checks.host_memory import check_host_memory
from verl.checks.images import check_image_key, check_images
from verl.checks.inert import Run, find_inert
from verl.checks.models import ModelFacts, check_model, check_tokenizer_of
from verl.checks.preflight import check_loggers, unexplained
from verl.findings import Findings
from verl.machine import installed_gpus, resolve_device, torch_is_cpu_build
from verl.memory.host_budget import HostBudget, budget_of_sft
from verl.plan import ModelSize

if TYPE_CHECKING:
    from verl.config.loading.load import Loaded
    from verl.config.sections.models import SFTConfig


def check(loaded: Loaded[SFTConfig], *, dry_run: bool) -> Findings:
    """All findings, problems of loading included. Does not use the network or import torch."""
    config, findings = loaded.draft, Findings(notices=list(loaded.notices))
    rows = train_rows(findings, config)
    data, trainer = config.data, config.trainer
    sets = {"data.train_files": data.train_files, "data.val_files": data.val_files}
    for key, files in sets.items():
        check_images(findings, key, files, data)
    check_image_key(
        findings, data.image_key, [file for files in sets.values() for file in paths(files)], loaded.set_keys
    )
    if rows is not None and rows < data.train_batch_size:
        why = f"the training data has only {rows} rows"
        findings.problem("data.train_batch_size", data.train_batch_size, why, f"set it to {rows} or less")
    facts = check_model(findings, "model.path", config.model.path)
    check_tokenizer_of(findings, "model", config.model, facts)
    if facts and facts.max_positions and data.max_length > facts.max_positions:
        why = f"the model's context is {facts.max_positions} tokens"
        findings.problem("data.max_length", data.max_length, why, f"set it to {facts.max_positions} or less")
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        why = "trainer.resume_mode=resume_path needs it"
        findings.problem("trainer.resume_from_path", None, why, "name a folder .../global_step_N")
    check_loggers(findings, trainer.logger)
    check_output_folder(findings, "trainer.default_local_dir", trainer.default_local_dir)
    if trainer.device == "cuda" and (torch_is_cpu_build() or not installed_gpus()) and not dry_run:
        findings.problem("trainer.device", "cuda", "this machine or its torch has no GPU", "set it to auto or cpu")
    if dry_run and (budget := _budget(config, facts)):
        kind = device_of(config)
        check_host_memory(findings, budget, kind, here=kind == "cpu" or installed_gpus() > 0)
    findings.warnings += find_inert(_run_of(config, loaded.set_keys))
    findings.problems = [*loaded.problems, *unexplained(findings.problems, loaded.problems)]
    return findings


def train_rows(findings: Findings, config: SFTConfig) -> int | None:
    data = config.data
    columns = {
        data.prompt_key: "name the column of the chat messages in data.prompt_key",
        data.response_key: "name the column of the response's text in data.response_key",
    }
    if data.val_files:
        check_parquet(findings, "data.val_files", data.val_files, columns)
    return check_parquet(findings, "data.train_files", data.train_files, columns)


def device_of(config: SFTConfig) -> Literal["cpu", "cuda"]:
    return resolve_device(config.trainer.device, 1, 0 if torch_is_cpu_build() else installed_gpus())


def _budget(config: SFTConfig, facts: ModelFacts | None) -> HostBudget | None:
    if facts is None or facts.parameters is None:
        return None
    return budget_of_sft(config, ModelSize(facts.parameters, facts.dtype), device_of(config))


def _run_of(config: SFTConfig, set_keys: frozenset[str]) -> Run:
    trainer = config.trainer
    return Run(
        config,
        set_keys,
        device_of(config),
        validates=bool(config.data.val_files) and trainer.test_freq > 0,
        saves=trainer.save_freq > 0,
    )


def plan_text(config: SFTConfig) -> str:
    rows, batch = train_rows(Findings(), config), config.data.train_batch_size
    steps: object = config.trainer.total_training_steps
    if steps is None:
        steps = "unknown until the data can be read" if rows is None else rows // batch * config.trainer.total_epochs
    budget = _budget(config, check_model(Findings(), "model.path", config.model.path))
    return "\n".join(
        [
            "Plan of the run",
            f"  model             {config.model.path}, on {device_of(config)}",
            f"  examples          {'unknown' if rows is None else rows}, {batch} a step",
            f"  left out          {'unknown' if rows is None else rows % batch} an epoch",
            f"  optimizer steps   {steps}",
            f"  folder            {config.trainer.default_local_dir}",
            *([] if budget is None else [f"  host memory       {budget}"]),
        ]
    )
