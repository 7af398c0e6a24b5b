"""Ctrl-C: the first requests a stop after the current step, the second stops at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130  # exit code of a program that SIGINT ended
STOPPING = "stopping after this step (Ctrl-C again: at once)"


class StopRequest:
    """Context manager that handles SIGINT and SIGTERM.

    The first signal sets ``requested`` and calls ``say``. The second raises KeyboardInterrupt."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, say: Callable[[], None]):
        self.requested = False
        self._say = say

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            # An interrupted event loop would log every unfinished task.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise KeyboardInterrupt
        self.requested = True
        self._say()
