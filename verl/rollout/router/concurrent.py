"""One order to several engines at once, each in a thread of its own: engines block while they get weights or sleep."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from verl.rollout.client.backend import WeightStream
from verl.rollout.contract.base import RolloutEngine
from verl.rollout.weights.fan import Fan, OwnFan


def in_threads(engines: Collection[RolloutEngine], order: Callable[[RolloutEngine], Awaitable[Any]]) -> list[Any]:
    """What each answered or raised."""
    with ThreadPoolExecutor(len(engines) or 1) as pool:
        calls = [pool.submit(asyncio_run, order(engine)) for engine in engines]
    return [call.exception() or call.result() for call in calls]


def deal(
    stream: WeightStream,
    engines: Collection[RolloutEngine],
    order: Callable[[RolloutEngine, WeightStream], Awaitable[Any]],
) -> list[Any]:
    """What each answered or raised; the stream is read once for all of them."""
    fan = stream.fan(len(engines)) if isinstance(stream, OwnFan) else Fan(len(engines))

    def read(engine: RolloutEngine, weights: WeightStream) -> Any:
        return asyncio_run(order(engine, weights))

    with ThreadPoolExecutor(len(engines) or 1) as pool:
        calls = [pool.submit(fan.run, index, partial(read, engine)) for index, engine in enumerate(engines)]
        fan.feed(stream)  # here: where it comes from may not like other threads
    return [call.exception() or call.result() for call in calls]


def asyncio_run(order: Awaitable[Any]) -> Any:
    """The order's result, in an event loop of this thread."""

    async def run() -> Any:
        return await order

    return asyncio.run(run())
