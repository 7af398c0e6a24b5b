"""Checks of a generation run before it starts, and its plan as text.

Engine and devices are checked as in training, where the same keys have ``actor_rollout_ref`` in front.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from verl.checks.files import check_output_folder, check_parquet, paths
from verl.checks.images import check_image_key, check_images
from verl.checks.inert import Run, find_inert
from verl.checks.models import check_model, check_tokenizer_of
from verl.checks.preflight import check_devices, check_engine, unexplained
from verl.checks.servers import check_servers
from verl.checks.settings import check_context, check_lengths
from verl.findings import Findings
from verl.machine import installed_gpus, resolve_device, torch_is_cpu_build
from verl.plan import EnginePlan, ceil_div, engine_of_generation

if TYPE_CHECKING:
    from verl.config.loading.load import Loaded
    from verl.config.sections.models import GenerationConfig

SUFFIXES = (".parquet", ".jsonl")
PREFIX = "actor_rollout_ref."


def check(loaded: Loaded[GenerationConfig], *, dry_run: bool) -> Findings:
    """All findings, problems of loading included. Does not use the network or import torch."""
    config, shared = loaded.draft, Findings()
    plan = plan_of(config)
    check_engine(shared, plan, dry_run)
    check_servers(shared, plan, dry_run)
    check_devices(shared, plan, config.trainer.device, plan_gpus(), dry_run)
    check_lengths(shared, config.data, config.rollout)
    facts = check_model(shared, "model.path", config.model.path)
    check_tokenizer_of(shared, "model", config.model, facts)
    if facts:
        positions = config.model.override_config.get("max_position_embeddings", facts.max_positions)
        check_context(shared, config.data, "model.path", positions)
    findings = _as_typed(shared)
    findings.notices = [*loaded.notices, *findings.notices]
    prompt_rows(findings, config)
    check_images(findings, "data.path", config.data.path, config.data, config.data.max_samples, config.rollout.name)
    check_image_key(findings, config.data.image_key, paths(config.data.path), loaded.set_keys)
    check_file_name(findings, "data.output_path", config.data.output_path)
    check_output_folder(findings, "data.output_path", str(Path(config.data.output_path).parent))
    _sampling(findings, config)
    findings.warnings += find_inert(
        Run(config, loaded.set_keys, plan.device, plan.world_size, plan.uses_ray, engine=plan.name)
    )
    findings.problems = [*loaded.problems, *unexplained(findings.problems, loaded.problems)]
    return findings


def plan_of(config: GenerationConfig) -> EnginePlan:
    trainer = config.trainer
    device = resolve_device(trainer.device, trainer.nnodes * trainer.n_gpus_per_node, plan_gpus())
    return engine_of_generation(config, device)


def plan_gpus() -> int:
    """The number of GPUs that torch can use here."""
    return 0 if torch_is_cpu_build() else installed_gpus()


def prompt_rows(findings: Findings, config: GenerationConfig) -> int | None:
    """The number of prompts; None if the files cannot be read."""
    columns = {config.data.prompt_key: "name the column of the chat messages in data.prompt_key"}
    rows = check_parquet(findings, "data.path", config.data.path, columns)
    limit = config.data.max_samples
    return rows if rows is None or limit < 0 else min(rows, limit)


def check_file_name(findings: Findings, key: str, file: str) -> None:
    """Checks that the file is new and that its name tells its format."""
    path = Path(file).expanduser()
    if path.suffix not in SUFFIXES:
        findings.problem(key, file, "its name does not tell its format", "end it in .parquet or .jsonl")
    elif path.exists():
        findings.problem(key, file, "it is there already", "name another file, or move that one away")


def _sampling(findings: Findings, config: GenerationConfig) -> None:
    rollout, longest = config.rollout, config.data.max_response_length
    if rollout.temperature == 0 and rollout.n > 1:
        why = "at temperature 0 all of a prompt's responses are the same"
        findings.problem("rollout.n", rollout.n, why, "set it to 1, or rollout.temperature=1")
    if rollout.min_new_tokens > longest:
        why = f"a response has at most data.max_response_length={longest} tokens"
        findings.problem("rollout.min_new_tokens", rollout.min_new_tokens, why, f"set it to {longest} or less")


def _as_typed(findings: Findings) -> Findings:
    """The findings with the names that the keys have in generation."""

    def here(text: str) -> str:
        return text.replace(PREFIX, "")

    return Findings(
        problems=[replace(p, key=here(p.key), why=here(p.why), fix=here(p.fix)) for p in findings.problems],
        warnings=list(map(here, findings.warnings)),
        unchecked=list(map(here, findings.unchecked)),
        notices=list(map(here, findings.notices)),
    )


def plan_text(config: GenerationConfig) -> str:
    rows, plan, data = prompt_rows(Findings(), config), plan_of(config), config.data
    size = f", {plan.tensor_parallel} devices each" if plan.tensor_parallel > 1 else ""
    batches = "unknown" if rows is None else ceil_div(rows, data.batch_size)
    return "\n".join(
        [
            "Plan of the run",
            f"  model       {config.model.path}",
            f"  engine      {plan.name}, {plan.replicas} on {plan.device}{size}",
            f"  prompts     {'unknown' if rows is None else rows}, {config.rollout.n} responses each",
            f"  batches     {batches} of {data.batch_size} prompts",
            f"  context     {plan.context_length:,} tokens",
            f"  written to  {data.output_path}",
        ]
    )
