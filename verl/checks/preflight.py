"""Checks everything that can be checked before a run starts, and reports all problems together."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl.checks.files import check_output_folder, check_parquet, paths
from verl.checks.host_memory import check_host_memory
from verl.checks.images import check_image_key, check_images
from verl.checks.inert import Run, find_inert
from verl.checks.models import ModelFacts, check_model, check_tokenizer_of, check_tokenizer_path
from verl.checks.rewards import check_reward_function, check_scoring
from verl.checks.servers import check_servers
from verl.checks.settings import ROLLOUT, check_context, check_settings
from verl.findings import Findings
from verl.machine import installed_gpus, resolve_device, torch_is_cpu_build
from verl.memory.host_budget import budget_of_run
from verl.plan import EnginePlan, ModelSize, RunPlan, engine_of, plan_run
from verl.reward.batch import ARGUMENTS as OF_A_BATCH
from verl.reward.scorers import ARGUMENTS
from verl.rollout.engines.registry import ADAPTERS
from verl.rollout.processes.adapter import Adapter
from verl.tracking import LOGGERS, how_to_install, missing_package

if TYPE_CHECKING:
    from verl.config.loading.load import Loaded
    from verl.config.loading.problems import Problem
    from verl.config.sections.base import Device
    from verl.config.sections.models import Config
    from verl.config.sections.reward import RewardModelModelConfig

DOTTED = re.compile(r"[a-z_]+(?:\.[a-z_]+)+")  # a key in a text

# Weights and Adam's two moments are saved in fp32. The Hugging Face export is another copy of the weights.
CHECKPOINT_BYTES, EXPORT_BYTES = 12, 4


def check(loaded: Loaded[Config], *, dry_run: bool) -> tuple[RunPlan, Findings]:
    """The plan of the run and all findings, problems of loading included.

    What only another machine can show (its GPUs, its engines) is listed as unchecked in a dry run, and is a problem in
    a real run. The checks do not use the network or import torch.
    """
    config, findings = loaded.draft, Findings(notices=list(loaded.notices))
    train_rows, val_rows = _data(findings, config, dry_run, loaded.set_keys)
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    gpus = 0 if torch_is_cpu_build() else installed_gpus()
    device = resolve_device(config.trainer.device, world, gpus)
    plan = plan_run(config, device=device, train_rows=train_rows, val_rows=val_rows)
    check_settings(findings, config, plan)
    plan = dataclasses.replace(plan, models=_models(findings, config, plan))
    engine = engine_of(config, plan)
    check_engine(findings, engine, dry_run)
    check_servers(findings, engine, dry_run)
    check_devices(findings, engine, config.trainer.device, gpus, dry_run)
    if dry_run and (budget := budget_of_run(config, plan)):
        here = not plan.uses_ray and (plan.device == "cpu" or gpus >= plan.devices_per_node)
        check_host_memory(findings, budget, plan.device, here)
    _files(findings, config, plan)
    for sentence in find_inert(Run.of_plan(config, plan, loaded.set_keys)):
        findings.warn(sentence)
    findings.problems = [*loaded.problems, *unexplained(findings.problems, loaded.problems)]
    return plan, findings


def unexplained(problems: list[Problem], faults: list[Problem]) -> list[Problem]:
    """The problems that do not follow from the problems of loading (``faults``)."""
    return [problem for problem in problems if not _follows(problem, faults)]


def _follows(problem: Problem, faults: list[Problem]) -> bool:
    """Whether the problem names a key that a fault names, as wrong or as the nearest to an unknown key. That key has
    its default now, which is not what the user wants."""
    named = set(DOTTED.findall(f"{problem.key} {problem.why}"))
    return any(named & set(DOTTED.findall(f"{fault.key} {fault.fix}")) for fault in faults)


def _data(findings: Findings, config: Config, dry_run: bool, set_keys: frozenset[str]) -> tuple[int | None, int | None]:
    """The number of rows of the training and validation data; None if they cannot be read."""
    data, trainer = config.data, config.trainer
    columns = {
        data.prompt_key: "name the column of the chat messages in data.prompt_key",
        data.reward_fn_key: "name the column that says where a row is from in data.reward_fn_key",
        "reward_model.ground_truth": "write the data set with its answers, as examples/data_preprocess/gsm8k.py does",
    }
    sets = {"train": data.train_files}
    if data.val_files and (trainer.test_freq > 0 or trainer.val_before_train):
        sets["val"] = data.val_files
    rows = {name: check_parquet(findings, f"data.{name}_files", files, columns) for name, files in sets.items()}
    used, engine = {"train": data.train_max_samples, "val": data.val_max_samples}, config.actor_rollout_ref.rollout.name
    for name, files in sets.items():
        check_images(findings, f"data.{name}_files", files, data, used[name], engine)
    check_image_key(findings, data.image_key, [file for files in sets.values() for file in paths(files)], set_keys)
    if config.uses_scorers and config.custom_reward_function.path is None:
        named = {f"data.{name}_files": files for name, files in sets.items()}
        check_scoring(findings, config.reward, named, data.reward_fn_key, dry_run, set_keys)
        if config.reward_model.reward_manager == "batch":
            fix = "name one in custom_reward_function.path, or leave it out: scorers of data sources take a sample each"
            findings.problem("reward_model.reward_manager", "batch", "it calls a reward function of yours", fix)
    if dry_run and any(rows.values()):
        what = "how many are longer and left out" if data.filter_overlong_prompts else "whether prompts are longer"
        findings.cannot_check(f"data.max_prompt_length={data.max_prompt_length}: {what}; a run counts before it starts")
    return _at_most(rows["train"], used["train"]), _at_most(rows.get("val"), used["val"])


def _at_most(rows: int | None, limit: int) -> int | None:
    return rows if rows is None or limit < 0 else min(rows, limit)


def _models(findings: Findings, config: Config, plan: RunPlan) -> dict[str, ModelSize]:
    """The sizes of the models whose files can be read, by role. A path that two keys share is read once."""
    actor, critic = config.actor_rollout_ref.model, config.critic.model
    found = _model(findings, config, "actor", "actor_rollout_ref.model.path", actor.path)
    check_tokenizer_of(findings, "actor_rollout_ref.model", actor, found.get("actor"))
    if plan.critic and critic.path != actor.path:
        found |= _model(findings, config, "critic", "critic.model.path", critic.path)
    elif plan.critic and "actor" in found:
        found["critic"] = found["actor"]
    reward = config.reward_model.model
    if "reward" in plan.roles and not reward.path:
        fix = "name a sequence classifier with one label"
        findings.problem("reward_model.model.path", reward.path, "reward_model.enable=True needs a model", fix)
    elif "reward" in plan.roles:
        facts = check_model(findings, "reward_model.model.path", reward.path)
        if facts is not None:
            _one_label(findings, reward, facts)
        if reward.input_tokenizer is None and facts is not None:
            check_context(findings, config.data, "reward_model.model.path", facts.max_positions)
        elif reward.input_tokenizer is not None:
            check_tokenizer_path(findings, "reward_model.model.path", reward.path)
            check_tokenizer_path(findings, "reward_model.model.input_tokenizer", reward.input_tokenizer)
        if facts is not None:
            found["reward"] = facts
    if "reference" in plan.roles and "actor" in found:
        found["reference"] = found["actor"]
    sizes = {role: _size(facts, whole=role != "critic") for role, facts in found.items()}
    return {role: size for role, size in sizes.items() if size is not None}


def _one_label(findings: Findings, reward: RewardModelModelConfig, facts: ModelFacts) -> None:
    labels = reward.override_config.get("num_labels", facts.labels)
    if labels == 1:
        return
    why = f"it has {labels} labels, and a score is one number"
    if not facts.classifies:
        why = "it is no sequence classifier (architectures in its config.json)"
    fix = "name a sequence classifier with one label (num_labels)"
    findings.problem("reward_model.model.path", reward.path, why, fix)


def _size(facts: ModelFacts, whole: bool) -> ModelSize | None:
    """whole: with output embeddings. A critic has a head of a few thousand parameters instead."""
    if facts.parameters is None:
        return None
    return ModelSize(facts.parameters - (0 if whole else facts.head), facts.dtype)


def _model(findings: Findings, config: Config, role: str, key: str, path: str) -> dict[str, ModelFacts]:
    facts = check_model(findings, key, path)
    if facts is None:
        return {}
    section = config.critic.model if role == "critic" else config.actor_rollout_ref.model
    positions = section.override_config.get("max_position_embeddings", facts.max_positions)
    check_context(findings, config.data, key, positions)
    return {role: facts}


def check_engine(findings: Findings, plan: EnginePlan, dry_run: bool) -> None:
    key, name = f"{ROLLOUT}.name", plan.name
    known = ("hf", *ADAPTERS)
    if name not in known:
        why = f"no engine has this name (known: {', '.join(known)})"
        findings.problem(key, name, why, f"set it to {_nearest(name, known)}")
    elif name in ADAPTERS:
        _adapter(findings, plan, ADAPTERS[name], dry_run)
    working = [size for size in range(1, plan.world_size + 1) if _splits(plan, size)]
    if plan.tensor_parallel not in working:
        nodes = f" ({plan.nnodes} nodes of {plan.devices_per_node})" if plan.nnodes > 1 else ""
        findings.problem(
            f"{ROLLOUT}.tensor_model_parallel_size",
            plan.tensor_parallel,
            f"{plan.world_size} devices{nodes} cannot be split into groups of {plan.tensor_parallel}",
            f"set it to one of {', '.join(map(str, working))}",
        )


def _splits(plan: EnginePlan, size: int) -> bool:
    """Whether the devices divide into tensor-parallel groups, each within a node or on all devices of several."""
    return plan.world_size % size == 0 and (plan.devices_per_node % size == 0 or size % plan.devices_per_node == 0)


def _adapter(findings: Findings, plan: EnginePlan, adapter: Adapter, dry_run: bool) -> None:
    rollout, name = plan.rollout, adapter.name
    if rollout.mode == "colocated" and not adapter.installed:
        if dry_run:
            findings.cannot_check(
                f"{ROLLOUT}.name={name}: {name} is not installed here; its own settings are not checked"
            )
        else:
            why = f"{name} is not installed in this environment"
            fix = (
                f'run pip install -e ".[{name}]" (without a GPU: make {name}-cpu), or set it to hf, the embedded engine'
            )
            findings.problem(f"{ROLLOUT}.name", name, why, fix)
    for argument, value in rollout.engine_kwargs.of(name).items():
        if argument in adapter.own_keys:
            key, why = f"{ROLLOUT}.engine_kwargs.{name}.{argument}", "another key decides this argument"
            findings.problem(key, value, f"{why} of {adapter.title}", f"set {adapter.own_keys[argument]}")
    if rollout.min_new_tokens and adapter.no_min_new_tokens:
        fix = f"set it to 0, or {ROLLOUT}.name=hf"
        findings.problem(f"{ROLLOUT}.min_new_tokens", rollout.min_new_tokens, adapter.no_min_new_tokens, fix)
    if plan.tensor_parallel > plan.devices_per_node and not adapter.spans_nodes:
        why = f"one {adapter.title} is on one node here, which has {plan.devices_per_node} devices"
        fix = f"set it to at most {plan.devices_per_node}, or {ROLLOUT}.name=sglang"
        findings.problem(f"{ROLLOUT}.tensor_model_parallel_size", plan.tensor_parallel, why, fix)
    if adapter.pass_has_all and rollout.max_num_batched_tokens < rollout.max_num_seqs:
        why = (
            f"{adapter.title} wants room in a pass for a token of each of {ROLLOUT}.max_num_seqs={rollout.max_num_seqs}"
        )
        fix = f"set it to at least {rollout.max_num_seqs}, or {ROLLOUT}.max_num_seqs lower"
        findings.problem(f"{ROLLOUT}.max_num_batched_tokens", rollout.max_num_batched_tokens, why, fix)
    for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        if rollout.mode == "colocated" and "expandable_segments:true" in os.environ.get(variable, "").lower():
            findings.warn(
                f"{variable} has expandable_segments on: new weights go to {adapter.title} through CUDA IPC, which "
                "such memory often refuses. Leave it out if the first weight update fails."
            )


def check_devices(findings: Findings, plan: EnginePlan, device: Device, gpus: int, dry_run: bool) -> None:
    """device: value of trainer.device. gpus: number of GPUs that torch can use here."""
    key, asked = "trainer.n_gpus_per_node", plan.devices_per_node
    if torch_is_cpu_build():
        have = "the torch that is installed is a CPU build"
    else:
        have = f"this machine has {gpus or 'no'} GPU{'s' if gpus != 1 else ''}"
    if plan.device == "cpu" and device == "auto" and installed_gpus():
        findings.warn(f"the run uses the CPU and not this machine's GPU: {have}. Install a CUDA build of torch.")
    if plan.uses_ray:
        if plan.device == "cuda" and torch_is_cpu_build() and not dry_run:
            findings.problem(
                key, asked, f"{have}, and the ranks' is the same", "install a CUDA build, or set trainer.device=cpu"
            )
        elif dry_run:
            lack = f" ({have})" if plan.device == "cuda" and torch_is_cpu_build() else ""
            findings.cannot_check(
                f"{key}={asked}: whether the Ray cluster has them{lack}; a run asks it before it starts"
            )
    elif plan.device == "cuda" and gpus < asked and dry_run:
        findings.cannot_check(f"{key}={asked}: {have}; the plan takes them as given, and their memory is not checked")
    elif device == "cuda" and gpus < asked:
        fix = f"set it to {gpus}" if gpus else f"set trainer.device=cpu and {key}=1"
        findings.problem(key, asked, have, fix)
    if plan.executor == "local" and plan.world_size > 1:
        why = f"it is one process, and the run asks for {plan.world_size} devices"
        findings.problem("trainer.executor", plan.executor, why, "leave it out, or set it to ray")
    if plan.uses_ray and plan.rollout.mode == "server":
        why = (
            "weights go to servers from a trainer that is one process, and this run's ranks are processes of their own"
        )
        fix = f"set {key}=1, trainer.nnodes=1 and trainer.executor=auto, or {ROLLOUT}.mode=colocated"
        findings.problem(f"{ROLLOUT}.mode", "server", why, fix)


def check_loggers(findings: Findings, names: Sequence[str]) -> None:
    for name in names:
        if name not in LOGGERS:
            why = f"there is no logger {name!r} (known: {', '.join(LOGGERS)})"
            findings.problem("trainer.logger", list(names), why, f"say {_nearest(name, LOGGERS)}, or leave it out")
        elif missing_package(name):
            why, _, fix = how_to_install(name).partition("; ")
            findings.problem("trainer.logger", list(names), f"{name}: {why}", f"{fix}, or leave {name} out")


def _files(findings: Findings, config: Config, plan: RunPlan) -> None:
    trainer, scorer = config.trainer, config.custom_reward_function
    check_loggers(findings, trainer.logger)
    needed = checkpoint_bytes(config, plan) if plan.save_freq > 0 else None
    check_output_folder(findings, "trainer.default_local_dir", str(trainer.default_local_dir), needed)
    if scorer.path is not None:
        batch = config.reward_model.reward_manager == "batch"
        arguments = (*(OF_A_BATCH.values() if batch else ARGUMENTS), *scorer.reward_kwargs)
        check_reward_function(findings, scorer.path, scorer.name, arguments)
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        folder = Path(trainer.resume_from_path).expanduser()
        if not folder.is_dir():
            fix = "name a folder .../global_step_N, or set trainer.resume_mode=auto"
            findings.problem("trainer.resume_from_path", trainer.resume_from_path, "there is no such folder", fix)


def checkpoint_bytes(config: Config, plan: RunPlan) -> int | None:
    """The most disk space of the run's checkpoints, in bytes: those that are kept and the one being written. None if
    unknown."""
    contents = {"actor": config.actor_rollout_ref.actor.checkpoint.save_contents}
    if plan.critic:
        contents["critic"] = config.critic.checkpoint.save_contents
    total = 0
    for role, names in contents.items():
        if role not in plan.models:
            return None
        total += plan.models[role].parameters * (CHECKPOINT_BYTES + (EXPORT_BYTES if "hf_model" in names else 0))
    saved = len(plan.steps(plan.saves)) or 1
    return total * min(saved, (config.trainer.max_ckpt_to_keep or saved) + 1)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = list(known)
    return (difflib.get_close_matches(name, names, n=1, cutoff=0.4) or [names[0]])[0]
