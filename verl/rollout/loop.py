"""The event loop of a run: one thread and one loop for the life of a rollout engine. Work on it outlives a stage.

trainer ── run(coroutine) ──> loop ──> engine      (blocks until the result)
        ── submit(coroutine) ─>                    (a future)
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

Answer = TypeVar("Answer")

CANCEL_TIMEOUT = 30.0  # seconds in which a cancelled coroutine has to end


class EventLoop:
    """A thread with an event loop. ``run`` and ``submit`` may be called from any other thread; ``close`` ends both.

    RuntimeError for a call after ``close``, or for ``run`` from the loop's own thread, which would wait for itself.
    """

    def __init__(self, name: str = "rollout loop"):
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Starts the coroutine and returns its future. Cancelling the future cancels the coroutine."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the event loop is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        """The coroutine's result, or what it raised. If the caller is interrupted (Ctrl-C), the coroutine is cancelled
        and gets CANCEL_TIMEOUT to end before the interrupt goes on."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("run() was called from the event loop's own thread: await the coroutine there")
        ended = threading.Event()

        async def tracked() -> Answer:
            try:
                return await work
            finally:
                ended.set()

        future = self.submit(tracked())
        try:
            return future.result()
        except BaseException:
            if not ended.is_set() and future.cancel():
                ended.wait(CANCEL_TIMEOUT)
            raise

    def close(self) -> None:
        """Cancels what still runs, and ends the thread. Closing twice is no error."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result(CANCEL_TIMEOUT)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_asyncgens()
