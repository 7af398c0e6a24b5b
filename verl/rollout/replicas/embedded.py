"""The embedded engine of a rank as a backend: its requests come from the driver, beside whatever the rank is doing.

It borrows the actor's module, which the ranks share out among themselves. Awake, every rank has the whole of it, and
none waits for another; asleep, it is sharded again, and the ranks can train.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np

from verl.rollout.client.backend import GenerateRequest, Listener, TokenChunk, WeightStream
from verl.rollout.contract.base import Capabilities, MemoryTag, Request, Result
from verl.rollout.embedded.engine import HFEngine
from verl.rollout.embedded.sampling import row_keys


class EmbeddedBackend:
    """See ``verl.rollout.client.backend.Backend``. The engine is used in one thread only."""

    keeps_weights = True

    def __init__(self, engine: HFEngine):
        self._engine = engine
        self.capabilities: Capabilities = replace(engine.capabilities, sleep=frozenset({"weights"}))
        self._whole = ExitStack()
        self._awake = False
        self._listener: Listener | None = None
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="embedded engine", daemon=True)
        self._thread.start()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    # ---- draws

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        return True

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        async def start() -> None:
            for request in requests:
                task = self._loop.create_task(self._generate(request))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        self._run(start())

    async def _generate(self, request: GenerateRequest) -> None:
        assert self._listener is not None
        generated = request.sampling.max_new_tokens - request.max_new_tokens  # before a pause
        sampling = replace(
            request.sampling,
            max_new_tokens=request.max_new_tokens,
            min_new_tokens=max(request.sampling.min_new_tokens - generated, 0),
            seed=seed_from(request.sampling.seed, generated),
        )
        try:
            (result,) = await self._engine.generate([Request(request.id, request.prompt_ids, sampling, request.images)])
        except Exception as error:
            self._listener.failed(request.id, error)
        else:
            self._listener.received([_report(result)])

    def abort(self, request_ids: Sequence[str]) -> None:
        self._run(self._engine.abort(list(request_ids)))

    # ---- weights and memory

    def update_weights(self, stream: WeightStream, version: int) -> None:
        self._run(self._engine.update_weights(stream, version))

    @property
    def update_seconds(self) -> Mapping[str, float]:
        return self._engine.update_seconds

    def check_weights(self, stream: WeightStream) -> list[str]:
        return []

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        """A collective of all ranks."""

        async def gather() -> None:
            if not self._awake:
                self._whole.enter_context(self._engine.whole_weights())
                self._awake = True

        self._run(gather())

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        async def share_out() -> None:
            self._awake = False
            self._whole.close()

        self._run(share_out())

    def drop_cache(self) -> None:
        """It is freed whenever nothing is under way."""

    def health(self) -> None:
        self._run(self._engine.health())

    def close(self) -> None:
        """The module is the trainer's again, as it was before it woke."""

        async def end() -> None:
            await self._engine.close()
            self._whole.close()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _report(result: Result) -> TokenChunk:
    return TokenChunk(result.id, result.response_ids, result.log_probs, result.finish_reason)


def seed_from(seed: int, position: int) -> int:
    """The seed whose noise is, from the first token on, that of ``seed`` from this position on: ``row_keys`` mixes
    (seed, position) as mix(mix(seed) + position * constant), and mix can be undone."""
    key = int(row_keys(np.array([seed % 2**64], np.uint64), np.array([position])).view(np.uint64)[0, 0])
    return _unmix64(_unmix64(key)) if position else seed


def _unmix64(x: int) -> int:
    """The inverse of splitmix64's output function, which ``verl.rollout.embedded.sampling`` mixes with."""
    for shift, factor in ((31, 0x94D049BB133111EB), (27, 0xBF58476D1CE4E5B9)):
        x = (x ^ x >> shift ^ x >> 2 * shift) * pow(factor, -1, 2**64) % 2**64
    return ((x ^ x >> 30 ^ x >> 60) - 0x9E3779B97F4A7C15) % 2**64
