"""What a run trains and generates with, wherever its ranks live."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl.cluster.base import WorkerGroup
from verl.rollout.client.backend import WeightStream
from verl.rollout.contract.base import RolloutEngine
from verl.rollout.loop import EventLoop
from verl.tracking import Progress


@dataclass(frozen=True)
class Runtime:
    """workers: the models in training, one ``PPOWorker`` a rank. rollout: the engine that generates; only ``loop``
    gives it orders. weights: starts a stream of the actor's weights for the engine. progress: what the console shows.
    abandon: ends what runs in other processes without waiting for it.
    """

    loop: EventLoop
    workers: WorkerGroup
    rollout: RolloutEngine
    weights: Callable[[], WeightStream]
    progress: Progress
    abandon: Callable[[], None] = lambda: None
