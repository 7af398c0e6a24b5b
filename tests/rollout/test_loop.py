"""The event loop on which a run's engine lives."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time

import pytest

from verl.rollout.loop import EventLoop


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


async def value(number: int) -> int:
    await asyncio.sleep(0)
    return number


def test_run_gives_the_result_and_raises_what_the_coroutine_raised(loop):
    async def fail():
        raise ValueError("no such thing")

    assert loop.run(value(3)) == 3
    with pytest.raises(ValueError, match=r"^no such thing$"):
        loop.run(fail())
    assert loop.run(value(4)) == 4


def test_a_task_goes_on_between_calls(loop):
    ticks = []

    async def tick():
        while True:
            ticks.append(threading.current_thread().name)
            await asyncio.sleep(0.001)

    future = loop.submit(tick())
    loop.run(value(1))
    seen = len(ticks)
    while len(ticks) < seen + 5:
        time.sleep(0.001)
    assert set(ticks) == {"rollout loop"}
    assert future.cancel()


def test_an_interrupt_of_the_caller_cancels_the_coroutine_before_it_goes_on(loop):
    ended = []

    async def wait():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts without it
    try:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            loop.run(wait())
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended == [True]
    assert loop.run(value(5)) == 5


def test_close_cancels_what_still_runs_and_a_later_call_is_refused():
    loop, ended = EventLoop(), []

    async def wait():
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    loop.submit(wait())
    loop.run(value(1))
    loop.close()
    loop.close()
    assert ended == [True]
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(value(1))


def test_run_from_the_loop_itself_is_refused_instead_of_waiting_for_ever(loop):
    async def nested():
        loop.run(value(1))

    with pytest.raises(RuntimeError, match="own thread"):
        loop.run(nested())
