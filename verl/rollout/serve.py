"""The loop of an engine process (see ``process.py``): takes the trainer's orders, and leaves when the trainer does."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from verl.rollout.process import raise_in_parent

PR_SET_PDEATHSIG = 1


class Orders:
    """The trainer's orders, one handler each; ``report`` sends what nobody asked for."""

    def __init__(self) -> None:
        self._connection = Connection(int(sys.argv[1]))
        self._sending = threading.Lock()
        self._reports: list[Any] = []
        die_with(int(sys.argv[2]))

    def first(self) -> tuple[int, str, tuple]:
        """The first order, which is taken before there is an event loop."""
        return self._connection.recv()

    def answer(self, number: int, worked: bool, value: Any) -> None:
        with self._sending:
            self._connection.send(("answer", number, worked, value))

    def report(self, message: Any) -> None:
        """Send soon, together with other reports of this turn of the event loop."""
        if not self._reports:
            asyncio.get_running_loop().call_soon(self._send_reports)
        self._reports.append(message)

    def _send_reports(self) -> None:
        reports, self._reports = self._reports, []
        with self._sending, contextlib.suppress(OSError):
            self._connection.send(("reports", reports))

    async def serve(self, handlers: dict[str, Callable[..., Awaitable[Any]]], leave: Callable[[], None]) -> None:
        """Until the trainer says leave, or is gone. Orders that follow one another may overlap."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        tasks: set[asyncio.Task] = set()

        async def carry_out(number: int, order: str, args: tuple) -> None:
            try:
                self.answer(number, True, await handlers[order](*args))
            except Exception as error:
                traceback.print_exc()
                self.answer(number, False, raise_in_parent(error))

        def take(message: tuple[int, str, tuple] | None) -> None:
            if message is None or message[1] == "leave":
                ended.set()
            else:
                task = loop.create_task(carry_out(*message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        def read() -> None:
            with contextlib.suppress(EOFError, OSError):
                while True:
                    loop.call_soon_threadsafe(take, self._connection.recv())
            loop.call_soon_threadsafe(take, None)

        threading.Thread(target=read, daemon=True).start()
        await ended.wait()
        leave()
        os.killpg(0, signal.SIGKILL)  # this process's group: it leads it, and it holds all that was started here


def die_with(parent: int) -> None:
    """End when the trainer's process does, however it ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)
