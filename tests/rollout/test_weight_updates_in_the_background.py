"""A weight update takes seconds, and its event loop serves others meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable

import pytest
from fake_backend import FakeBackend

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, WeightStream
from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import IllegalState, Request, SamplingParams
from verl.rollout.router.router import Replica, Router

SECONDS = 0.4
Engine = ClientEngine | Router


class SlowBackend(FakeBackend):
    """Each weight update takes SECONDS, or until the backend is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.updating = threading.Event()
        self.ended = threading.Event()

    def update_weights(self, stream: WeightStream, version: int) -> None:
        self.updating.set()
        if self.ended.wait(SECONDS):
            raise EngineDied("it was closed")
        super().update_weights(stream, version)

    def close(self) -> None:
        self.ended.set()
        super().close()


def client() -> ClientEngine:
    return ClientEngine(SlowBackend(), eos_token_ids=[1], max_model_len=100, vocab_size=100)


def router() -> Router:
    return Router([Replica("one", client()), Replica("two", client())])


def backends(engine: Engine) -> list[SlowBackend]:
    engines = [engine] if isinstance(engine, ClientEngine) else [each.engine for each in engine.members]
    return [each.backend for each in engines]  # type: ignore[attr-defined]


def request(id: str) -> Request:
    return Request(id, (5, 6), SamplingParams(max_new_tokens=8))


async def under_way(engine: Engine) -> None:
    while not all(backend.updating.is_set() for backend in backends(engine)):
        await asyncio.sleep(0.001)


both = pytest.mark.parametrize("make", [client, router])


@both
def test_other_coroutines_advance_during_a_weight_update(make: Callable[[], Engine]):
    async def run() -> int:
        engine, ticks = make(), 0
        update = asyncio.create_task(engine.update_weights([], version=1))
        started = time.monotonic()
        while not update.done():
            await asyncio.sleep(0.01)
            ticks += 1
        assert time.monotonic() - started >= SECONDS
        await update
        await engine.close()
        return ticks

    assert asyncio.run(run()) >= SECONDS / 0.01 / 4


@both
def test_what_needs_the_engine_for_itself_is_refused_during_an_update_which_goes_on(make: Callable[[], Engine]):
    async def run() -> None:
        engine = make()
        update = asyncio.create_task(engine.update_weights([], version=1))
        await under_way(engine)
        orders = {
            "generate": lambda: engine.generate([request("a")]),
            "pause": engine.pause,
            "update_weights": lambda: engine.update_weights([], version=2),
            "check_weights": lambda: engine.check_weights([]),
        }
        for name, order in orders.items():
            with pytest.raises(IllegalState) as refusal:
                await order()
            assert str(refusal.value) == f"{name}: update_weights is under way; wait until it has returned"
        await engine.health()
        await update
        for backend in backends(engine):
            assert "generate" not in backend.log
            backend.go()
        (result,) = await engine.generate([request("a")])
        assert result.weight_versions == [(1, 0)]
        await engine.close()

    asyncio.run(run())


@both
def test_requests_that_come_during_an_update_of_a_paused_engine_are_generated_with_the_new_weights(make):
    async def run() -> None:
        engine = make()
        await engine.pause()
        update = asyncio.create_task(engine.update_weights([], version=3))
        await under_way(engine)
        generation = asyncio.create_task(engine.generate([request("a")]))
        await update
        assert not any("generate" in backend.log for backend in backends(engine))
        for backend in backends(engine):
            backend.go()
        await engine.resume()
        (result,) = await generation
        assert result.weight_versions == [(3, 0)]
        assert len(result.response_ids) == 8
        await engine.close()

    asyncio.run(run())


@both
def test_an_engine_can_be_closed_in_the_midst_of_an_update(make: Callable[[], Engine]):
    async def run() -> None:
        engine = make()
        update = asyncio.create_task(engine.update_weights([], version=1))
        await under_way(engine)
        started = time.monotonic()
        await engine.close()
        with pytest.raises(UserError):
            await update
        assert time.monotonic() - started < SECONDS

    asyncio.run(run())


@both
def test_an_update_whose_caller_is_cancelled_still_has_the_engine_for_itself(make: Callable[[], Engine]):
    async def run() -> None:
        engine = make()
        update = asyncio.create_task(engine.update_weights([], version=1))
        await under_way(engine)
        update.cancel()
        with pytest.raises(asyncio.CancelledError):
            await update
        with pytest.raises(IllegalState):
            await engine.update_weights([], version=2)
        await asyncio.sleep(2 * SECONDS)
        await engine.update_weights([], version=2)
        await engine.close()

    asyncio.run(run())
