"""The engine of a generation run: as training has it, but with the model's own weights from the start."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerBase

from verl.config.sections.models import Config
from verl.engine import TrainEngine
from verl.plan import RunPlan
from verl.rollout.contract.base import RolloutEngine
from verl.rollout.loop import EventLoop
from verl.tracking import Progress
from verl.trainer.ppo.engines import embedded_engine, start_engine
from verl.trainer.ppo.worker import PPOWorker

if TYPE_CHECKING:
    from verl.cluster.ray.rank import RankContext


class Started(NamedTuple):
    """abandon: ends what is elsewhere without waiting for it."""

    engine: RolloutEngine
    abandon: Callable[[], None] = lambda: None


class Reader(PPOWorker):
    """Holds the model for the embedded engine, and trains nothing."""

    def _build(self, role: str) -> TrainEngine:
        return TrainEngine(
            self.config.actor_rollout_ref.model, "policy", self.fsdp_configs[role], device=self.plan.device
        )


def make_reader(context: RankContext, config: Config, plan: RunPlan) -> Reader:
    """For a rank: see ``verl.cluster.ray.rank.Rank.make``."""
    return Reader(config, plan)


def start(
    stack: ExitStack,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
) -> Started:
    """In this process, or on servers or in a process started here. stack: closes it. folder: for its output."""
    started = start_engine(config, plan, tokenizer, folder, progress.note, no_weights=None)
    if started:
        stack.callback(lambda: asyncio.run(started.close()))
        return Started(started)
    reader = Reader(config, plan)
    stack.callback(reader.close)
    return Started(embedded_engine(config, plan, reader, tokenizer))


def start_on_ray(
    stack: ExitStack,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
) -> Started:
    """A replica on each group of ranks."""
    from verl.trainer.ppo import on_ray
    from verl.trainer.ppo.ranks import WORKER

    seats = on_ray.seats_of_ranks(stack, config, plan)
    ranks, replicas = on_ray.start_ranks(stack, config, plan, tokenizer, seats, folder, progress, no_weights=None)
    if plan.engine == "hf":
        ranks.make(WORKER, "verl.trainer.generation.engine:make_reader", config, plan)
    loop = EventLoop()
    stack.callback(loop.close)
    rollout = on_ray.start_replicas(stack, replicas, loop)
    if tags := sorted(rollout.capabilities.sleep):
        loop.run(rollout.wake(tags))
    stack.push(ranks.end)
    return Started(rollout, abandon=ranks.close)
