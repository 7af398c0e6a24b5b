"""The loop of an engine process (see ``process.py``): takes the trainer's orders, and leaves when the trainer does."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

from verl.errors import portable
from verl.rollout.processes import guard


class Orders:
    """The trainer's orders, one handler each; ``report`` sends what nobody asked for."""

    def __init__(self) -> None:
        self._connection = Connection(int(sys.argv[1]))
        self._sending = threading.Lock()
        self._reports: list[Any] = []
        if not guard.die_with(int(sys.argv[2]), signal.SIGKILL):
            os._exit(1)
        self._guard = subprocess.Popen([sys.executable, "-IS", guard.__file__, str(os.getpid())])

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
        """Until the orders end: the trainer has closed, or is gone. Orders that follow one another may overlap."""
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        tasks: set[asyncio.Task] = set()

        async def carry_out(number: int, order: str, args: tuple) -> None:
            try:
                self.answer(number, True, await handlers[order](*args))
            except (Exception, asyncio.CancelledError) as error:
                traceback.print_exc()
                self.answer(number, False, portable(error))

        def take(message: tuple[int, str, tuple] | None) -> None:
            if message is None:
                ended.set()
            else:
                task = loop.create_task(carry_out(*message))
                tasks.add(task)
                task.add_done_callback(tasks.discard)

        def read() -> None:
            try:
                with contextlib.suppress(EOFError, OSError):
                    while True:
                        loop.call_soon_threadsafe(take, self._connection.recv())
            finally:  # also after an order that could not be read
                loop.call_soon_threadsafe(take, None)

        threading.Thread(target=read, daemon=True).start()
        await ended.wait()
        try:
            leave()
        finally:
            os.killpg(0, signal.SIGKILL)  # this process's group: it leads it, and it holds all that was started here
