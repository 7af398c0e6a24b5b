"""Everything that can be known before a run starts, checked before it starts, all of it in one report."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from verl.checks.files import check_output_folder, check_parquet
from verl.checks.findings import Findings
from verl.checks.inert import find_inert
from verl.checks.machine import resolve_device, torch_is_cpu_build, visible_gpus
from verl.checks.models import ModelFacts, check_model, check_tokenizer, check_tokenizer_path
from verl.checks.plan import RunPlan, plan_run
from verl.checks.settings import ROLLOUT, check_context, check_settings
from verl.tracking import LOGGERS

if TYPE_CHECKING:
    from verl.config.load import Loaded
    from verl.config.models import Config

# Engines that rollout.name may name; those with an adapter in this version.
ENGINES = ("hf", "sglang", "vllm")
ADAPTERS = ("hf",)

# Of each thing that a checkpoint may hold: weights are saved in fp32, and so are Adam's two moments.
BYTES_A_PARAMETER = {"model": 4, "optimizer": 8, "extra": 0, "hf_model": 4}


def check(loaded: Loaded, *, dry_run: bool) -> tuple[RunPlan, Findings]:
    """The plan of the run and what is wrong with it. ``loaded.config`` must be there.

    In a dry run what only another machine could tell (its GPUs, its engines) is unchecked; in a real one it is a
    problem. Nothing here asks the network or imports torch.
    """
    config, findings = loaded.config, Findings()
    findings.problems += loaded.problems
    findings.notices += loaded.notices
    train_rows, val_rows = _data(findings, config)
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    device = resolve_device(config.trainer.device, world, visible_gpus())
    plan = plan_run(config, device=device, train_rows=train_rows, val_rows=val_rows)
    check_settings(findings, config, plan)
    models = _models(findings, config, plan)
    _engine(findings, config, plan, dry_run)
    _devices(findings, config, plan, dry_run)
    _files(findings, config, plan, models)
    for sentence in find_inert(config, plan, loaded.set_keys):
        findings.warn(sentence)
    return plan, findings


def _data(findings: Findings, config: Config) -> tuple[int | None, int | None]:
    """Rows of the training and validation data, as far as they can be read."""
    data, trainer = config.data, config.trainer
    columns = {
        data.prompt_key: "name the column of the chat messages in data.prompt_key",
        data.reward_fn_key: "name the column that says where a row is from in data.reward_fn_key",
        "reward_model.ground_truth": "write the data set with its answers, as examples/data_preprocess/gsm8k.py does",
    }
    train_rows = check_parquet(findings, "data.train_files", data.train_files, columns)
    val_rows = None
    if data.val_files and (trainer.test_freq > 0 or trainer.val_before_train):
        val_rows = check_parquet(findings, "data.val_files", data.val_files, columns)
    return _at_most(train_rows, data.train_max_samples), _at_most(val_rows, data.val_max_samples)


def _at_most(rows: int | None, limit: int) -> int | None:
    return rows if rows is None or limit < 0 else min(rows, limit)


def _models(findings: Findings, config: Config, plan: RunPlan) -> dict[str, ModelFacts]:
    """Facts of the models that could be looked at, by role. A path that two keys share is looked at once."""
    actor, critic = config.actor_rollout_ref.model, config.critic.model
    found = _model(findings, config, "actor", "actor_rollout_ref.model.path", actor.path)
    if actor.tokenizer_path == actor.path:
        if "actor" in found:
            check_tokenizer(findings, "actor_rollout_ref.model.path", actor.path, found["actor"].folder)
    else:
        check_tokenizer_path(findings, "actor_rollout_ref.model.tokenizer_path", actor.tokenizer_path)
    if plan.critic and critic.path != actor.path:
        found |= _model(findings, config, "critic", "critic.model.path", critic.path)
    elif plan.critic and "actor" in found:
        found["critic"] = found["actor"]
    return found


def _model(findings: Findings, config: Config, role: str, key: str, path: str) -> dict[str, ModelFacts]:
    facts = check_model(findings, key, path)
    if facts is None:
        return {}
    check_context(findings, config, key, facts.max_positions)
    return {role: facts}


def _engine(findings: Findings, config: Config, plan: RunPlan, dry_run: bool) -> None:
    key, name = f"{ROLLOUT}.name", plan.engine
    if name not in ENGINES:
        findings.problem(
            key, name, f"no engine has this name (known: {', '.join(ENGINES)})", f"set it to {_nearest(name, ENGINES)}"
        )
    elif name not in ADAPTERS:
        where = "is installed here" if importlib.util.find_spec(name) else "is not installed here"
        if dry_run:
            findings.cannot_check(
                f"{key}={name}: {name} {where}, and this version cannot start it yet; its own settings are not checked"
            )
        else:
            why = f"this version has no adapter for {name} yet ({name} {where})"
            findings.problem(key, name, why, "set it to hf, the embedded engine")
    if plan.world_size % plan.tensor_parallel:
        working = [size for size in range(1, plan.world_size + 1) if plan.world_size % size == 0]
        findings.problem(
            f"{ROLLOUT}.tensor_model_parallel_size",
            plan.tensor_parallel,
            f"{plan.world_size} devices cannot be split into groups of {plan.tensor_parallel}",
            f"set it to one of {', '.join(map(str, working))}",
        )


def _devices(findings: Findings, config: Config, plan: RunPlan, dry_run: bool) -> None:
    key, asked = "trainer.n_gpus_per_node", plan.devices_per_node
    if plan.device == "cuda" and visible_gpus() < asked:
        have = f"this machine has {visible_gpus() or 'no'} GPU{'s' if visible_gpus() != 1 else ''}"
        if torch_is_cpu_build():
            have = "the torch that is installed is a CPU build"
        if dry_run:
            findings.cannot_check(
                f"{key}={asked}: {have}; the plan takes them as given, and their memory is not checked"
            )
        else:
            fix = (
                "set trainer.device=cpu and trainer.n_gpus_per_node=1"
                if not visible_gpus()
                else f"set it to {visible_gpus()}"
            )
            findings.problem(key, asked, have, fix)
    if plan.world_size > 1:
        what = f"{plan.nnodes} nodes × {asked} devices" if plan.nnodes > 1 else f"{asked} devices"
        if dry_run:
            findings.cannot_check(
                f"{what} need the Ray executor, which is not in this version: the plan is for one that has it"
            )
        else:
            fix = "set trainer.n_gpus_per_node=1 and trainer.nnodes=1"
            findings.problem(key, asked, f"{what} need the Ray executor; this version trains on one device", fix)


def _files(findings: Findings, config: Config, plan: RunPlan, models: dict[str, ModelFacts]) -> None:
    trainer, scorer = config.trainer, config.custom_reward_function
    for name in trainer.logger:
        if name not in LOGGERS:
            why = f"there is no logger {name!r} (known: {', '.join(LOGGERS)})"
            findings.problem("trainer.logger", trainer.logger, why, f"say {_nearest(name, LOGGERS)}, or leave it out")
    needed = checkpoint_bytes(config, plan, models) if plan.save_freq > 0 else None
    check_output_folder(findings, "trainer.default_local_dir", str(trainer.default_local_dir), needed)
    if scorer.path is not None and not Path(scorer.path).expanduser().is_file():
        findings.problem("custom_reward_function.path", scorer.path, "there is no such file", "name a Python file")
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        folder = Path(trainer.resume_from_path).expanduser()
        if not folder.is_dir():
            fix = "name a folder .../global_step_N, or set trainer.resume_mode=auto"
            findings.problem("trainer.resume_from_path", trainer.resume_from_path, "there is no such folder", fix)


def checkpoint_bytes(config: Config, plan: RunPlan, models: dict[str, ModelFacts]) -> int | None:
    """What the run's checkpoints take at most: as many as are kept, and the one being written. None if unknown."""
    contents = {"actor": config.actor_rollout_ref.actor.checkpoint.save_contents}
    if plan.critic:
        contents["critic"] = config.critic.checkpoint.save_contents
    total = 0
    for role, names in contents.items():
        parameters = models[role].parameters if role in models else None
        if parameters is None:
            return None
        total += parameters * sum(BYTES_A_PARAMETER[name] for name in names)
    saved = len(plan.steps(plan.saves)) or 1
    return total * min(saved, (config.trainer.max_ckpt_to_keep or saved) + 1)


def _nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    names = list(known)
    return (difflib.get_close_matches(name, names, n=1, cutoff=0.4) or [names[0]])[0]
