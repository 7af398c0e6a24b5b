"""Every order in every state: what makes sense reaches the backend, what does not is refused before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
import torch
from fake_backend import EOS, FakeBackend

from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import IllegalState, Request, SamplingParams, Unsupported

BOTH = ["weights", "kv_cache"]
WEIGHTS = [("weight", torch.zeros(2))]

# What the backend sees of an order; "" for one that is carried out without it.
ORDERS: dict[str, tuple[Callable[[ClientEngine], Awaitable], str]] = {
    "generate": (lambda engine: asyncio.wait_for(engine.generate([request("new")]), 0.01), "generate"),
    "abort": (lambda engine: engine.abort(), ""),
    "pause": (lambda engine: engine.pause(), ""),
    "resume": (lambda engine: engine.resume(), ""),
    "update": (lambda engine: engine.update_weights(WEIGHTS, version=1), "update_weights"),
    "check": (lambda engine: engine.check_weights(WEIGHTS), "check_weights"),
    "sleep weights": (lambda engine: engine.sleep(["weights"]), "sleep weights"),
    "sleep cache": (lambda engine: engine.sleep(["kv_cache"]), "sleep kv_cache"),
    "sleep": (lambda engine: engine.sleep(BOTH), "sleep weights kv_cache"),
    "wake weights": (lambda engine: engine.wake(["weights"]), "wake weights"),
    "wake cache": (lambda engine: engine.wake(["kv_cache"]), "wake kv_cache"),
    "wake": (lambda engine: engine.wake(BOTH), "wake weights kv_cache"),
    "health": (lambda engine: engine.health(), "health"),
    "close": (lambda engine: engine.close(), "close"),
}

ALWAYS = {"abort", "health", "close"}
AWAKE = {"update", "check", "sleep weights", "sleep cache", "sleep"}
# State -> (orders that lead to it from an idle engine that is awake, what makes sense in it).
STATES: dict[str, tuple[list[str], set[str]]] = {
    "idle": ([], ALWAYS | AWAKE | {"generate", "pause"}),
    "paused": (["pause"], ALWAYS | AWAKE | {"hold", "resume"}),
    "busy": (["generate"], ALWAYS | {"generate", "pause"}),
    "paused while busy": (["generate", "pause"], ALWAYS | AWAKE | {"hold", "resume"}),
    "weights asleep": (["sleep weights"], ALWAYS | {"pause", "sleep cache", "wake weights"}),
    "cache asleep": (["sleep cache"], ALWAYS | {"pause", "update", "check", "sleep weights", "wake cache"}),
    "asleep": (["sleep"], ALWAYS | {"pause", "wake weights", "wake cache", "wake"}),
    "weights lost": (["sleep", "wake"], ALWAYS | AWAKE | {"pause"}),
    "weights lost, cache asleep": (
        ["sleep", "wake weights"],
        ALWAYS | {"pause", "update", "check", "sleep weights", "wake cache"},
    ),
    "weights back": (["sleep", "wake", "update"], ALWAYS | AWAKE | {"generate", "pause"}),
    "cache asleep and back": (["sleep cache", "wake cache"], ALWAYS | AWAKE | {"generate", "pause"}),
    "paused, then asleep": (["pause", "sleep"], ALWAYS | {"wake weights", "wake cache", "wake"}),
    "paused, weights lost": (["pause", "sleep", "wake"], ALWAYS | AWAKE),
    "paused, weights back": (["pause", "sleep", "wake", "update"], ALWAYS | AWAKE | {"hold", "resume"}),
    "closed": (["close"], {"abort", "close"}),
}


def request(id: str) -> Request:
    return Request(id, [5, 6, 7], SamplingParams(max_new_tokens=300))


def build(**options) -> tuple[ClientEngine, FakeBackend]:
    backend = FakeBackend(**options)
    engine = ClientEngine(backend, eos_token_ids=[EOS], max_model_len=400, vocab_size=100)
    return engine, backend


async def lead(engine: ClientEngine, backend: FakeBackend, orders: list[str]) -> list[asyncio.Task]:
    calls = []
    for order in orders:
        if order == "generate":
            calls.append(asyncio.create_task(engine.generate([request("busy")])))
            await asyncio.sleep(0)
        else:
            await ORDERS[order][0](engine)
    return calls


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("order", ORDERS)
def test_an_order_reaches_the_backend_exactly_where_it_makes_sense(order, state):
    engine, backend = build(sleep=BOTH)
    backend.go()
    path, sensible = STATES[state]
    give, seen = ORDERS[order]

    async def run() -> None:
        calls = await lead(engine, backend, path)
        before = list(backend.log)
        if order == "generate" and "hold" in sensible:
            with pytest.raises(TimeoutError):
                await give(engine)
            assert backend.log == before
        elif order not in sensible:
            with pytest.raises(IllegalState, match=f"^{'update_weights' if order == 'update' else order.split()[0]}"):
                await give(engine)
            assert backend.log == before
        else:
            try:
                await give(engine)
            except TimeoutError:
                assert order == "generate"
            assert not seen or seen in backend.log[len(before) :] or state == "closed"
        for call in calls:
            call.cancel()

    asyncio.run(run())
    backend.closed = True


def test_weights_that_are_kept_in_sleep_need_not_come_again():
    engine, backend = build(sleep=BOTH, keeps_weights=True)
    backend.go()

    async def run() -> None:
        await engine.sleep(BOTH)
        await engine.wake(BOTH)
        with pytest.raises(TimeoutError):
            await ORDERS["generate"][0](engine)

    asyncio.run(run())
    assert "generate" in backend.log
    backend.closed = True


def test_an_engine_that_cannot_sleep_says_so_and_one_that_can_knows_its_tags():
    engine, backend = build()
    for order in (engine.sleep(["weights"]), engine.wake(["kv_cache"])):
        with pytest.raises(Unsupported, match="cannot sleep here"):
            asyncio.run(order)
    engine, other = build(sleep=["kv_cache"])
    with pytest.raises(Unsupported, match="no memory tag 'weights'"):
        asyncio.run(engine.sleep(["weights"]))
    with pytest.raises(IllegalState, match="twice"):
        asyncio.run(engine.sleep(["kv_cache", "kv_cache"]))
    assert backend.log == other.log == []


def test_memory_that_could_not_be_had_is_still_asleep():
    engine, backend = build(sleep=BOTH)

    async def run() -> None:
        await engine.sleep(BOTH)
        backend.fails["wake weights"] = Unsupported("the GPU is full")
        with pytest.raises(Unsupported, match="full"):
            await engine.wake(["weights"])
        backend.fails.clear()
        await engine.wake(["weights"])

    asyncio.run(run())
