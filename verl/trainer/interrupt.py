"""Ctrl-C: the first asks for a stop at the next good point, the second stops at once."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType

INTERRUPTED = 130  # the exit code of a program that SIGINT ended
STOPPING = "stopping after this step (Ctrl-C again: at once)"


class StopRequest:
    """Context manager that takes over SIGINT and SIGTERM. ``requested`` turns true at the first one; a second raises
    KeyboardInterrupt where the program is. say: told once, at the first."""

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
            # An event loop that this ends would tell of each task it leaves behind.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            raise KeyboardInterrupt
        self.requested = True
        self._say()
