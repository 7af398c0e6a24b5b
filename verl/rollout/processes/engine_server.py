"""Carries out the trainer's orders in an engine's process: the part that is the same for all engines. The orders come
from ``SubprocessBackend`` through ``order_loop.Orders``."""

from __future__ import annotations

import asyncio
import difflib
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from verl.errors import UserError
from verl.rollout.client.backend import GenerateRequest, TokenChunk
from verl.rollout.processes.adapter import Adapter
from verl.rollout.processes.order_loop import Orders

IDLE_TIMEOUT = 60.0
ABORT_INTERVAL = 0.05


def run(make: Callable[[Orders, dict[str, Any]], EngineServer]) -> None:
    """The process's main function. make: starts the engine, with the arguments that the first order brings."""
    orders = Orders()
    number, order, (arguments,) = orders.first()
    assert order == "start", order
    try:
        server = make(orders, arguments)
    except UserError as error:
        orders.answer(number, False, error)
        return
    server.loop.run_until_complete(server.serve(number))


class EngineServer(ABC):
    """loop: the event loop that the engine was made for."""

    loop: asyncio.AbstractEventLoop

    def __init__(self, orders: Orders, adapter: Adapter):
        self._orders, self._adapter = orders, adapter
        self._under_way: set[str] = set()

    async def serve(self, first_order: int) -> None:
        """Until the trainer leaves; says first that the engine is up."""
        self._orders.answer(first_order, True, self.facts())
        names = ("generate", "abort", "tokens_under_way", "receive_weights", "drop_cache", "sleep", "wake", "health")
        handlers: dict[str, Callable[..., Awaitable[Any]]] = {name: getattr(self, name) for name in names}
        await self._orders.serve(handlers, self.shutdown)

    # ---- orders

    async def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self._under_way.update(request.id for request in requests)
        await asyncio.gather(*(self._generate(request) for request in requests))

    async def _generate(self, request: GenerateRequest) -> None:
        try:
            async for report in self.outputs(request):
                self._orders.report(report)
        except Exception as error:
            self._orders.report((request.id, f"{self._adapter.title} did not take the request: {error}"))
        finally:
            self._under_way.discard(request.id)

    async def abort(self, request_ids: Sequence[str]) -> None:
        """Again and again: a request that has not reached the scheduler yet is not there to be aborted."""
        while under_way := [id for id in request_ids if id in self._under_way]:
            await self.abort_in_engine(under_way)
            await asyncio.sleep(ABORT_INTERVAL)

    async def drop_cache(self) -> None:
        deadline = time.monotonic() + IDLE_TIMEOUT
        while refusal := await self.flush():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self._adapter.title} is not idle after {IDLE_TIMEOUT:.0f} s: {refusal}")
            await asyncio.sleep(0.005)

    async def tokens_under_way(self) -> int:
        """Of the draw, among those that have not ended, that has most; 0 where the engine does not say."""
        return max(self.generated_so_far(list(self._under_way)), default=0)

    # ---- what each engine does in its own way

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the adapter describes, and "end_tokens": at which the engine always ends a response."""

    @abstractmethod
    def outputs(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        """All that is drawn, as it comes; the last one says why it ended."""

    @abstractmethod
    async def abort_in_engine(self, request_ids: Sequence[str]) -> None:
        """End those of these that the engine knows; their outputs end with finish "abort"."""

    @abstractmethod
    def generated_so_far(self, request_ids: Sequence[str]) -> list[int]:
        """How many tokens those of these draws have that the engine knows."""

    @abstractmethod
    async def receive_weights(self, version: int | None) -> None:
        """Have every worker hold a session (``weights.receiver.serve_worker``)."""

    @abstractmethod
    async def flush(self) -> str | None:
        """Forget all keys and values; why not, if the engine is still busy."""

    @abstractmethod
    async def sleep(self, tags: Sequence[str]) -> None: ...

    @abstractmethod
    async def wake(self, tags: Sequence[str]) -> None: ...

    @abstractmethod
    async def health(self) -> None: ...

    @abstractmethod
    def shutdown(self) -> None: ...


def check_arguments(adapter: Adapter, arguments: dict[str, Any], known: Sequence[str], version: str) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(
                f"actor_rollout_ref.rollout.engine_kwargs.{adapter.name}.{name}: {adapter.title} {version} has no such "
                f"argument{hint}"
            )
