"""Puts a PPO run together from its settings, runs it, and says at the end where everything is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.algorithms.kl import kl_control
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
from verl.rollout.loop import EventLoop
from verl.tracking import Progress, Trackers, build_trackers
from verl.trainer.checkpoints import Checkpoint, Checkpoints
from verl.trainer.interrupt import STOPPING, StopRequest
from verl.trainer.ppo.engines import embedded_engine, start_engine
from verl.trainer.ppo.feed import SynchronousFeed
from verl.trainer.ppo.log_prob_check import check_log_probs
from verl.trainer.ppo.phases import put_to_sleep
from verl.trainer.ppo.responder import Responder
from verl.trainer.ppo.run_state import RunState
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.samples import Samples
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.trainer import PPOTrainer
from verl.trainer.ppo.validation import Validation
from verl.trainer.ppo.weight_sync import WeightSync
from verl.trainer.ppo.worker import PPOWorker, model_of
from verl.trainer.run_lock import RunLock
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

    with RunLock(folder_of(config.trainer), "trainer.default_local_dir"):
        return run_in_folder(config, loaded.set_keys, plan, tokenizer, train_prompts, val_prompts)


def run_in_folder(
    config: Config,
    set_keys: Iterable[str],
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    train_prompts: pa.Table,
    val_prompts: pa.Table | None,
) -> int:
    """The exit code. The folder of the run is this process's alone."""
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
        folder = run_folder(config, set_keys)
        trackers = stack.enter_context(
            build_trackers(config.trainer.logger, run_info(config, folder, plan.last_step, start))
        )
        if set_aside := checkpoints.set_aside(after=start.step if start else 0):
            trackers.progress.note(f"checkpoints that this run does not go on from are now in {set_aside}")
        stop = stack.enter_context(StopRequest(lambda: trackers.progress.note(STOPPING)))
        tables = [train_prompts] if val_prompts is None else [train_prompts, val_prompts]
        rewards = build_rewards(stack, config, tokenizer, tables, folder, trackers)
        reward_inputs = build_reward_inputs(config, tokenizer)
        loop = EventLoop()
        stack.callback(loop.close)
        if plan.uses_ray:
            runtime = on_ray.build_on_ray(stack, loop, config, plan, tokenizer, seats, folder, trackers.progress)
        else:
            runtime = build_here(stack, loop, config, plan, tokenizer, folder, trackers.progress)
        for role, reason in runtime.workers.call("unpackable").result()[0].items():
            trackers.progress.note(f"{role}: sequences are padded, not packed: {reason}")
        samples = Samples(config, tokenizer, trackers)
        trainer = build_trainer(
            config,
            plan,
            runtime,
            rewards,
            reward_inputs,
            train_prompts,
            val_prompts,
            checkpoints,
            trackers,
            samples,
            start,
            stop=lambda: stop.requested,
        )
        if start:
            trackers.progress.note(f"going on from {start.folder}")
        finished = finishes(trainer.fit, runtime.abandon)
    return close_run(
        config.trainer,
        checkpoints,
        trainer.step,
        finished,
        validation=samples.validation_folder,
        skipped=trainer.updates.skipped,
    )


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
    loop: EventLoop,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
) -> Runtime:
    """One rank, in this process. ``stack`` closes what is started here."""
    engine = engine_of(config, plan)
    started = start_engine(engine, tokenizer, folder, progress.note)
    if started:
        stack.callback(lambda: loop.run(started.close()))
        put_to_sleep(started, loop)
    worker = PPOWorker(config, plan)
    workers = LocalWorkerGroup(worker)
    stack.callback(workers.close)
    rollout = started or embedded_engine(engine, worker.engines["actor"], tokenizer)
    return Runtime(loop, workers, rollout, worker.weights, progress)


def build_trainer(
    config: Config,
    plan: RunPlan,
    runtime: Runtime,
    rewards: RewardManager | None,
    reward_inputs: RewardModelInputs | None,
    train_prompts: pa.Table,
    val_prompts: pa.Table | None,
    checkpoints: Checkpoints,
    trackers: Trackers,
    samples: Samples,
    start: Checkpoint | None,
    stop: Callable[[], bool],
) -> PPOTrainer:
    """The trainer at its first step, or at the step of the checkpoint ``start``, which is then restored."""
    stages, kl = Stages(runtime), kl_control(config.algorithm.kl_ctrl)
    weight_sync = WeightSync(stages, config.trainer.check_weights)
    responder = Responder(stages, weight_sync, rewards, reward_inputs)
    feed = SynchronousFeed(config, plan, train_prompts, stages, responder)
    state = RunState(checkpoints, stages, feed, kl, has_critic=plan.critic is not None)

    def check(log: StepLog) -> str:
        return check_log_probs(config, plan, train_prompts, stages, log)

    return PPOTrainer(
        config,
        plan,
        stages=stages,
        feed=feed,
        weight_sync=weight_sync,
        validation=Validation(config, plan, val_prompts, responder, samples),
        state=state,
        samples=samples,
        kl_control=kl,
        trackers=trackers,
        check_log_probs=check if config.trainer.check_log_probs else None,
        stop=stop,
        step=state.restore(start) if start else 0,
    )
