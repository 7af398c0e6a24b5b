"""Starts the engine of a generation run, which generates with the model's own weights from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from transformers import PreTrainedTokenizerBase

from verl.config.sections.models import FSDPConfig, GenerationConfig
from verl.engine import TrainEngine
from verl.plan import EnginePlan
from verl.rollout.contract.base import RolloutEngine
from verl.rollout.loop import EventLoop
from verl.tracking import Progress
from verl.trainer.ppo.engines import embedded_engine, start_engine

if TYPE_CHECKING:
    from verl.cluster.ray.rank import RankContext


class Started(NamedTuple):
    """abandon: ends what runs elsewhere without waiting for it."""

    engine: RolloutEngine
    abandon: Callable[[], None] = lambda: None


class ModelHolder:
    """Holds the model that the embedded engine generates with. On a rank it takes the place of training's worker."""

    def __init__(self, plan: EnginePlan):
        model = TrainEngine(plan.model, "policy", FSDPConfig(), device=plan.device)
        self.engines = {"actor": model}

    @contextmanager
    def borrowed(self, role: str) -> Iterator[None]:
        """The model is always on its device."""
        yield

    def close(self) -> None:
        self.engines["actor"].close()


def make_holder(context: RankContext, plan: EnginePlan) -> ModelHolder:
    """For a rank: see ``verl.cluster.ray.rank.Rank.make``."""
    return ModelHolder(plan)


def start(
    stack: ExitStack,
    loop: EventLoop,
    config: GenerationConfig,
    plan: EnginePlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
) -> Started:
    """The engine on one device: in this process, in a process of its own, or on servers. ``stack`` closes it.

    loop: runs the engine's coroutines. folder: for the output of its process.
    """
    started = start_engine(plan, tokenizer, folder, progress.note, no_weights=None)
    if started:
        stack.callback(lambda: loop.run(started.close()))
        return Started(started)
    holder = ModelHolder(plan)
    stack.callback(holder.close)
    return Started(embedded_engine(plan, holder.engines["actor"], tokenizer))


def start_on_ray(
    stack: ExitStack,
    loop: EventLoop,
    config: GenerationConfig,
    plan: EnginePlan,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    progress: Progress,
) -> Started:
    """The engine with a replica on each group of ranks. The parameters are those of ``start``."""
    from verl.trainer.ppo import on_ray
    from verl.trainer.ppo.ranks import WORKER

    seats = on_ray.seats_of_ranks(stack, config.ray_kwargs, plan)
    ranks, replicas = on_ray.start_ranks(
        stack, plan, tokenizer, seats, folder, progress, timeout=config.trainer.worker_timeout, no_weights=None
    )
    if plan.name == "hf":
        ranks.make(WORKER, "verl.trainer.generation.engine:make_holder", plan)
    rollout = on_ray.start_replicas(stack, replicas, loop)
    if tags := sorted(rollout.capabilities.sleep):
        loop.run(rollout.wake(tags))
    stack.push(ranks.end)
    return Started(rollout, abandon=ranks.close)
