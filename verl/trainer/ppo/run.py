"""Puts a PPO run together from its settings, runs it, and says at the end where everything is."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.checks.findings import Findings
from verl.checks.plan import RunPlan, plan_run
from verl.cluster.local import LocalWorkerGroup
from verl.config.dump import resolved_yaml
from verl.config.load import Loaded
from verl.config.models import Config
from verl.data.dataset import load_prompts
from verl.data.tokenizer import end_token_ids, load_tokenizer
from verl.errors import UserError
from verl.reward.manager import RewardManager
from verl.rollout.base import RolloutEngine
from verl.rollout.registry import build_engine
from verl.tracking import RunInfo, Trackers, build_trackers
from verl.tracking.report import write_report
from verl.trainer.checkpoints import Checkpoint, Checkpoints
from verl.trainer.interrupt import INTERRUPTED, STOPPING, StopRequest
from verl.trainer.ppo.trainer import Parts, PPOTrainer
from verl.trainer.ppo.worker import PPOWorker


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
    plan = plan_run(config, device=plan.device, train_rows=train_prompts.num_rows, val_rows=val_rows)

    folder = Path(config.trainer.default_local_dir).expanduser()
    checkpoints = Checkpoints(folder, config.trainer.max_ckpt_to_keep)
    start = where_to_start(config, checkpoints)
    if start and start.step >= plan.last_step:
        print(f"{start.folder} is the end of this run: nothing to do (trainer.resume_mode=disable starts anew)")
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(resolved_yaml(config))

    with ExitStack() as stack:
        trackers = stack.enter_context(build_trackers(config.trainer.logger, run_info(config, plan, folder, start)))
        if set_aside := checkpoints.set_aside(after=start.step if start else 0):
            trackers.progress.note(f"checkpoints that this run does not go on from are now in {set_aside}")
        stop = stack.enter_context(StopRequest(lambda: trackers.progress.note(STOPPING)))
        parts = build_parts(stack, config, plan, tokenizer, train_prompts, val_prompts, checkpoints, trackers)
        trainer = PPOTrainer(config, plan, parts, stop=lambda: stop.requested)
        if start:
            trainer.restore(start)
            trackers.progress.note(f"going on from {start.folder}")
        try:
            trainer.fit()
        except KeyboardInterrupt:
            stop.requested = True
    finished = trainer.step >= plan.last_step
    if "file" in config.trainer.logger:
        try:
            write_report(folder, validation=trainer.validation_folder)
        except UserError as error:  # the run is over and its result safe
            print(f"warning: no report was written: {error}")
    print(closing_words(folder, checkpoints, trainer.step, finished))
    return 0 if finished else INTERRUPTED


def say(findings: Findings) -> None:
    for kind, texts in (
        ("notice", findings.notices),
        ("warning", findings.warnings),
        ("not checked", findings.unchecked),
    ):
        for text in texts:
            print(f"{kind}: {text}")


def read_prompts(
    config: Config, plan: RunPlan, tokenizer: PreTrainedTokenizerBase
) -> tuple[pa.Table, pa.Table | None]:
    def notice(text: str) -> None:
        print(f"notice: {text}")

    train = load_prompts(config.data.train_files, tokenizer, config.data, kind="train", notice=notice)
    if not config.data.val_files or not (plan.test_freq > 0 or plan.val_before_train):
        return train, None
    return train, load_prompts(config.data.val_files, tokenizer, config.data, kind="val", notice=notice)


def where_to_start(config: Config, checkpoints: Checkpoints) -> Checkpoint | None:
    """The checkpoint that trainer.resume_mode asks for; None: from the beginning."""
    trainer = config.trainer
    if trainer.resume_mode == "disable":
        return None
    if trainer.resume_mode == "resume_path" and trainer.resume_from_path:
        return checkpoints.at(Path(trainer.resume_from_path).expanduser())
    return checkpoints.latest(warn=lambda text: print(f"warning: {text}"))


def run_info(config: Config, plan: RunPlan, folder: Path, start: Checkpoint | None) -> RunInfo:
    return RunInfo(
        project=config.trainer.project_name,
        experiment=config.trainer.experiment_name,
        folder=folder,
        config=config.model_dump(mode="json"),
        total_steps=plan.last_step,
        resume_step=start.step if start else None,
    )


def build_parts(
    stack: ExitStack,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    train_prompts: pa.Table,
    val_prompts: pa.Table | None,
    checkpoints: Checkpoints,
    trackers: Trackers,
) -> Parts:
    """``stack`` closes what is started here."""
    tables = [train_prompts] if val_prompts is None else [train_prompts, val_prompts]
    rewards = RewardManager(
        config.reward,
        config.custom_reward_function,
        tokenizer,
        data_sources={source for table in tables for source in table["data_source"].unique().to_pylist()},
        error_log=checkpoints.folder / "reward_errors.jsonl",
    )
    stack.callback(rewards.close)
    worker = PPOWorker(config, plan)
    workers = LocalWorkerGroup(worker)
    stack.callback(workers.close)
    rollout = build_rollout(config, plan, worker, tokenizer)
    return Parts(workers, rollout, rewards, tokenizer, train_prompts, val_prompts, checkpoints, trackers)


def build_rollout(
    config: Config, plan: RunPlan, worker: PPOWorker, tokenizer: PreTrainedTokenizerBase
) -> RolloutEngine:
    """The embedded engine generates with the actor's own module."""
    rollout, actor = config.actor_rollout_ref.rollout, worker.engines["actor"]
    return build_engine(
        rollout.name,
        module=actor.module,
        root=actor.root,
        tokenizer=tokenizer,
        eos_token_ids=end_token_ids(tokenizer, config.actor_rollout_ref.model.path),
        max_model_len=plan.context_length,
        max_num_seqs=rollout.max_num_seqs,
        max_prefill_tokens=rollout.max_num_batched_tokens,
    )


def closing_words(folder: Path, checkpoints: Checkpoints, step: int, finished: bool) -> str:
    kept = checkpoints.all()
    where = f"Everything is in {folder}" + (f", the last checkpoint in {kept[-1].folder.name}" if kept else "")
    if finished:
        return f"Finished after step {step}. {where}."
    if kept:
        return f"Stopped in or after step {step}. {where}. The same command goes on from step {kept[-1].step + 1}."
    return (
        f"Stopped in or after step {step}. {where}. No checkpoint was written, so the same command starts from the "
        "beginning: set trainer.save_freq to be able to go on."
    )
