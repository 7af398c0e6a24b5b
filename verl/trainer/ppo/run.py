"""Puts a PPO run together from its settings, runs it, and says at the end where everything is."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.checks.host_memory import require_host_memory
from verl.cluster.local import LocalWorkerGroup
from verl.config.loading.load import Loaded
from verl.config.sections.models import Config
from verl.data.dataset import load_prompts
from verl.data.tokenizer import load_tokenizer
from verl.engine.model import model_size, read_config
from verl.findings import Findings
from verl.machine import HostMemory, host_memory
from verl.memory.host_budget import budget_of_run
from verl.plan import ModelSize, RunPlan, engine_of, plan_run
from verl.reward.manager import RewardManager
from verl.reward.model_inputs import RewardModelInputs
from verl.tracking import Trackers, build_trackers
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.interrupt import STOPPING, StopRequest
from verl.trainer.ppo.engines import embedded_engine, start_engine
from verl.trainer.ppo.phases import put_to_sleep
from verl.trainer.ppo.trainer import Parts, PPOTrainer, Trained
from verl.trainer.ppo.worker import PPOWorker, model_of
from verl.trainer.runs import close_run, finishes, folder_of, run_folder, run_info, say, where_to_start


def run(loaded: Loaded[Config], plan: RunPlan, findings: Findings) -> int:
    """The exit code. ``plan`` and ``findings``: of the checks, which found no problem."""
    config = loaded.config
    assert config is not None
    say(findings)
    tokenizer = load_tokenizer(
        config.actor_rollout_ref.model.tokenizer_path, config.actor_rollout_ref.model.trust_remote_code
    )
    train_prompts, val_prompts = read_prompts(config, plan, tokenizer)
    val_rows = val_prompts.num_rows if val_prompts is not None else None
    models = sizes_of_models(config, plan.roles)
    plan = plan_run(config, device=plan.device, train_rows=train_prompts.num_rows, val_rows=val_rows, models=models)

    checkpoints = Checkpoints(folder_of(config.trainer), config.trainer.max_ckpt_to_keep)
    start = where_to_start(config.trainer, checkpoints, plan.last_step)
    if start and start.step >= plan.last_step:
        return 0
    with ExitStack() as stack:
        machines = [("this machine", host_memory())]
        if plan.uses_ray:
            from verl.trainer.ppo import on_ray

            seats = on_ray.seats_of_ranks(stack, config.ray_kwargs, plan)
            machines = on_ray.host_memories(seats)
        check_host_memory(config, plan, machines)
        folder = run_folder(config, loaded.set_keys)
        trackers = stack.enter_context(
            build_trackers(config.trainer.logger, run_info(config, folder, plan.last_step, start))
        )
        if set_aside := checkpoints.set_aside(after=start.step if start else 0):
            trackers.progress.note(f"checkpoints that this run does not go on from are now in {set_aside}")
        stop = stack.enter_context(StopRequest(lambda: trackers.progress.note(STOPPING)))
        tables = [train_prompts] if val_prompts is None else [train_prompts, val_prompts]
        rewards = build_rewards(stack, config, tokenizer, tables, checkpoints.folder, trackers)
        reward_inputs = build_reward_inputs(config, tokenizer)
        if plan.uses_ray:
            trained = on_ray.build_on_ray(stack, config, plan, tokenizer, seats, checkpoints.folder, trackers)
        else:
            trained = build_here(stack, config, plan, tokenizer, checkpoints.folder, trackers)
        for role, reason in trained.workers.call("unpackable").result()[0].items():
            trackers.progress.note(f"{role}: sequences are padded, not packed: {reason}")
        trainer = PPOTrainer(
            config,
            plan,
            Parts(
                trained.workers,
                trained.weights,
                trained.rollout,
                rewards,
                reward_inputs,
                tokenizer,
                train_prompts,
                val_prompts,
                checkpoints,
                trackers,
            ),
            stop=lambda: stop.requested,
        )
        if start:
            trainer.restore(start)
            trackers.progress.note(f"going on from {start.folder}")
        finished = finishes(trainer.fit, trained.abandon)
    return close_run(config.trainer, checkpoints, trainer.step, finished, validation=trainer.validation_folder)


def read_prompts(config: Config, plan: RunPlan, tokenizer: PreTrainedTokenizerBase) -> tuple[pa.Table, pa.Table | None]:
    def notice(text: str) -> None:
        print(f"notice: {text}")

    train = load_prompts(config.data.train_files, tokenizer, config.data, kind="train", notice=notice)
    if not config.data.val_files or not plan.validates_ever:
        return train, None
    return train, load_prompts(config.data.val_files, tokenizer, config.data, kind="val", notice=notice)


def sizes_of_models(config: Config, roles: Iterable[str]) -> dict[str, ModelSize]:
    """By role; a model that is one with another's is looked at once."""
    models = {role: model_of(config, role) for role in roles}
    found: dict[str, ModelSize] = {}
    for role, (model, kind) in models.items():
        same = [other for other in found if models[other] == (model, kind)]
        found[role] = found[same[0]] if same else model_size(model, kind)
    return found


def check_host_memory(config: Config, plan: RunPlan, machines: Sequence[tuple[str, HostMemory]]) -> None:
    """machines: in the order of the ranks."""
    budgets = [budget for node in range(plan.nnodes) if (budget := budget_of_run(config, plan, node))]
    if warning := require_host_memory(budgets, machines, plan.device):
        print(f"warning: {warning}")


def build_rewards(
    stack: ExitStack,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[pa.Table],
    folder: Path,
    trackers: Trackers,
) -> RewardManager | None:
    if not config.uses_scorers:
        return None
    rewards = RewardManager(
        config.reward,
        config.custom_reward_function,
        tokenizer,
        data_sources={source for table in prompts for source in table["data_source"].unique().to_pylist()},
        batch=config.reward_model.reward_manager == "batch",
        error_log=folder / "reward_errors.jsonl",
        warn=trackers.progress.warn,
    )
    stack.callback(rewards.close)
    return rewards


def build_reward_inputs(config: Config, tokenizer: PreTrainedTokenizerBase) -> RewardModelInputs | None:
    if not config.reward_model.enable:
        return None
    pad_token_id = read_config(config.reward_model.model, "reward").pad_token_id
    return RewardModelInputs(config.reward_model, tokenizer, pad_token_id)


def build_here(
    stack: ExitStack,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    trackers: Trackers,
) -> Trained:
    """One rank, in this process. ``stack`` closes what is started here."""
    engine = engine_of(config, plan)
    started = start_engine(engine, tokenizer, folder, trackers.progress.note)
    if started:
        stack.callback(lambda: asyncio.run(started.close()))
        put_to_sleep(started)
    worker = PPOWorker(config, plan)
    workers = LocalWorkerGroup(worker)
    stack.callback(workers.close)
    rollout = started or embedded_engine(engine, worker.engines["actor"], tokenizer)
    return Trained(workers, worker.weights, rollout)
