"""Builds a supervised run from its settings, runs it, and prints where its results are."""

from __future__ import annotations

from contextlib import ExitStack

import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from verl.checks.host_memory import require_host_memory
from verl.checks.sft import device_of
from verl.config.loading.load import Loaded
from verl.config.sections.models import SFTConfig
from verl.data.tokenizer import load_tokenizer
from verl.engine import TrainEngine
from verl.engine.model import model_size
from verl.findings import Findings
from verl.machine import host_memory
from verl.memory.host_budget import budget_of_sft
from verl.tracking import build_trackers
from verl.trainer.checkpoints import Checkpoints
from verl.trainer.interrupt import STOPPING, StopRequest
from verl.trainer.runs import close_run, finishes, folder_of, run_folder, run_info, say, where_to_start
from verl.trainer.sft.examples import load_examples
from verl.trainer.sft.trainer import SFTTrainer


def run(loaded: Loaded[SFTConfig], findings: Findings) -> int:
    """The exit code. findings: what the checks found, without a problem."""
    config = loaded.config
    assert config is not None
    say(findings)
    tokenizer = load_tokenizer(config.model.tokenizer_path, config.model.trust_remote_code)
    train, val = read_examples(config, tokenizer)
    last_step = steps_of(config, train.num_rows)

    checkpoints = Checkpoints(folder_of(config.trainer), config.trainer.max_ckpt_to_keep)
    start = where_to_start(config.trainer, checkpoints, last_step)
    if start and start.step >= last_step:
        return 0
    budget = budget_of_sft(config, model_size(config.model, "policy"), device_of(config))
    if warning := require_host_memory([budget], [("this machine", host_memory())], device_of(config)):
        print(f"warning: {warning}")
    folder = run_folder(config, loaded.set_keys)
    with ExitStack() as stack:
        trackers = stack.enter_context(
            build_trackers(config.trainer.logger, run_info(config, folder, last_step, start))
        )
        if set_aside := checkpoints.set_aside(after=start.step if start else 0):
            trackers.progress.note(f"checkpoints after this run's start were moved to {set_aside}")
        stop = stack.enter_context(StopRequest(lambda: trackers.progress.note(STOPPING)))
        engine = build_engine(config, last_step)
        stack.callback(engine.close)
        trainer = SFTTrainer(
            config,
            engine,
            tokenizer,
            train,
            val,
            checkpoints,
            trackers,
            last_step=last_step,
            stop=lambda: stop.requested,
        )
        if start:
            trainer.restore(start)
            trackers.progress.note(f"resuming from {start.folder}")
        finished = finishes(trainer.fit)
    return close_run(config.trainer, checkpoints, trainer.step, finished)


def read_examples(config: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[pa.Table, pa.Table | None]:
    def notice(text: str) -> None:
        print(f"notice: {text}")

    train = load_examples(config.data.train_files, tokenizer, config.data, kind="train", notice=notice)
    if not config.data.val_files:
        return train, None
    return train, load_examples(config.data.val_files, tokenizer, config.data, kind="val", notice=notice)


def steps_of(config: SFTConfig, rows: int) -> int:
    """Optimizer steps of the run. The last, smaller batch of an epoch is left out."""
    return config.trainer.total_training_steps or rows // config.data.train_batch_size * config.trainer.total_epochs


def build_engine(config: SFTConfig, last_step: int) -> TrainEngine:
    return TrainEngine(
        config.model,
        "policy",
        config.fsdp_config,
        optim_config=config.optim,
        grad_clip=config.optim.grad_clip,
        total_steps=last_step,
        device=device_of(config),
        seed=config.trainer.seed,
    )
