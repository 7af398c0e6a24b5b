"""Who has the device's memory when: the rollout engine and the models in training take turns.

    train ──> update (engine: weights) ──> generate (engine: weights, KV cache) ──> train (engine: nothing) ──> ...

The KV cache is never there together with a model that is loaded for a stage, and the engine's weights only while they
are filled from the actor's. An engine that cannot sleep stays as it is throughout.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from verl.rollout.contract.base import MemoryTag, RolloutEngine


def put_to_sleep(rollout: RolloutEngine) -> None:
    """A new engine, which has measured the memory that it found free: now the models may have it."""
    if tags := sorted(rollout.capabilities.sleep):
        asyncio.run(rollout.sleep(tags))


class Phases:
    """rollout: put to sleep. free_memory: has the trainer's allocator leave room for what is about to wake."""

    def __init__(self, rollout: RolloutEngine, free_memory: Callable[[list[MemoryTag]], object]):
        self._rollout, self._free_memory = rollout, free_memory
        self._asleep: set[MemoryTag] = set(rollout.capabilities.sleep)

    def train(self) -> None:
        """Nothing of the engine's is on the device; its weights are lost and have to come again."""
        self._sleep({"weights", "kv_cache"})

    def update(self) -> None:
        """The engine has room for its weights, and not more. One that borrows the trainer's model gave it back after
        it drew, and takes none of it now."""
        if not self._rollout.capabilities.holds_weights:
            return
        self._sleep({"kv_cache"})
        self._wake({"weights"})

    def generate(self) -> None:
        """All of the engine is on the device."""
        self._wake({"weights", "kv_cache"})

    def _sleep(self, tags: set[MemoryTag]) -> None:
        if tags := (tags & self._rollout.capabilities.sleep) - self._asleep:
            asyncio.run(self._rollout.sleep(sorted(tags)))
            self._asleep |= tags

    def _wake(self, tags: set[MemoryTag]) -> None:
        if tags := tags & self._asleep:
            self._free_memory(sorted(tags))
            asyncio.run(self._rollout.wake(sorted(tags)))
            self._asleep -= tags
