"""Which of the rollout engine and the models in training holds the device's memory, and when.

    train ──> update (engine: weights) ──> generate (engine: weights, KV cache) ──> train (engine: nothing) ──> ...

The KV cache is never on the device together with a model that is loaded for a stage. The engine's weights are there
only while it generates, or while they are filled from the actor's. An engine that cannot sleep stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

from verl.rollout.contract.base import MemoryTag, RolloutEngine
from verl.rollout.loop import EventLoop


def put_to_sleep(rollout: RolloutEngine, loop: EventLoop) -> None:
    """Frees the memory of a new engine for the models. The engine has measured before how much memory was free."""
    if tags := sorted(rollout.capabilities.sleep):
        loop.run(rollout.sleep(tags))


class Phases:
    """rollout: asleep at first. free_memory: makes the trainer's allocator release what it caches, before the engine
    wakes these tags."""

    def __init__(self, rollout: RolloutEngine, loop: EventLoop, free_memory: Callable[[list[MemoryTag]], object]):
        self._rollout, self._loop, self._free_memory = rollout, loop, free_memory
        self._asleep: set[MemoryTag] = set(rollout.capabilities.sleep)

    def train(self) -> None:
        """The engine holds nothing on the device. Its weights are lost and have to be sent again."""
        self._sleep({"weights", "kv_cache"})

    def update(self) -> None:
        """The engine holds its weights and no cache. An engine that borrows the trainer's model needs neither."""
        if not self._rollout.capabilities.holds_weights:
            return
        self._sleep({"kv_cache"})
        self._wake({"weights"})

    def generate(self) -> None:
        """The engine holds all of its memory."""
        self._wake({"weights", "kv_cache"})

    def _sleep(self, tags: set[MemoryTag]) -> None:
        if tags := (tags & self._rollout.capabilities.sleep) - self._asleep:
            self._loop.run(self._rollout.sleep(sorted(tags)))
            self._asleep |= tags

    def _wake(self, tags: set[MemoryTag]) -> None:
        if tags := tags & self._asleep:
            self._free_memory(sorted(tags))
            self._loop.run(self._rollout.wake(sorted(tags)))
            self._asleep -= tags
