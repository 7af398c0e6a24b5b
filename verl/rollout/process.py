"""An inference engine's own process, as the trainer sees it: orders go in, answers and reports come out, and its death
is a message and not the trainer's. ``verl.rollout.serve`` is the other end.

    trainer ── call ──> (socket pair) ──> engine process ──> its workers
       reader thread <── answers, reports ──┘

Nobody else can connect: the socket has no name. The process leads a session of its own, so that a Ctrl-C meant for
the trainer does not reach it, and so that all of its children end with it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from verl.errors import UserError
from verl.rollout.backend import EngineDied

LAST_LINES = 20
ANSWER_TIMEOUT = 300.0  # seconds; an order is milliseconds of work, on a machine that is not overloaded
LEAVE_TIMEOUT = 20.0
EXIT_TIMEOUT = 10.0  # from the end of the connection to that of the process


class EngineProcess:
    """Starts ``python -m module`` and speaks to it.

    name: what messages call it. log: the file that takes its output. on_report: called from the reader thread with
    each report (anything that is not an answer). on_death: called once, from that thread, unless it was closed.
    """

    def __init__(
        self,
        module: str,
        *,
        name: str,
        log: Path,
        environment: Mapping[str, str],
        on_report: Callable[[Any], None],
        on_death: Callable[[EngineDied], None],
    ):
        self.name, self.log = name, log
        self._on_report, self._on_death = on_report, on_death
        self._answers: dict[int, tuple[str, Future[Any]]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._closing = False
        self.death: EngineDied | None = None
        log.parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs, log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(os.getpid())],
                pass_fds=[theirs.fileno()],
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._reader = threading.Thread(target=self._read, name=f"{name} reports", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, order: str, *args: Any, timeout: float = ANSWER_TIMEOUT) -> Any:
        """The answer. Raises what the order raised there (UserErrors as they are), or EngineDied."""
        try:
            return self.ask(order, *args).result(timeout)
        except TimeoutError:
            if self.death:
                raise EngineDied(str(self.death)) from None
            raise self._lost(f"did not answer {order!r} within {timeout:.0f} s") from None

    def ask(self, order: str, *args: Any) -> Future[Any]:
        """Give an order and return at once."""
        future: Future[Any] = Future()
        with self._lock:
            if self.death:
                raise EngineDied(str(self.death))
            number = next(self._numbers)
            self._answers[number] = order, future
            with contextlib.suppress(OSError):  # it has just died: the reader says why
                self._connection.send((number, order, args))
        return future

    def alive(self) -> bool:
        return self.death is None and self._process.poll() is None

    def close(self, timeout: float = LEAVE_TIMEOUT) -> None:
        """Ask it to leave, and see to it that it does."""
        if not self._closing:
            self._closing = True
            with contextlib.suppress(EngineDied, OSError, TimeoutError):
                if self.alive():
                    self.ask("leave")
                self._process.wait(timeout)
        self._end()
        self._reader.join(timeout)

    # ---- the reader

    def _read(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if message[0] == "answer":
                    _, number, worked, value = message
                    _, future = self._answers.pop(number)
                    future.set_result(value) if worked else future.set_exception(value)
                else:
                    self._on_report(message)
        except (EOFError, OSError):
            self._gone()

    def _gone(self) -> None:
        """The process is gone or about to be, with or without our asking."""
        try:
            reason = _reason(self._process.wait(EXIT_TIMEOUT))
        except subprocess.TimeoutExpired:
            reason = "its connection closed"
        self._end()
        with self._lock:
            doing = sorted({order for order, _ in self._answers.values()} - {"leave"})
            orders = f" while it was asked to {', '.join(doing)}" if doing else ""
            self.death = self._lost(f"ended with {reason}{orders}")
            answers, self._answers = list(self._answers.values()), {}
        for _, future in answers:
            future.set_exception(self.death)
        if not self._closing:
            self._on_death(self.death)

    def _lost(self, what: str) -> EngineDied:
        lines = "\n".join(f"    {line}" for line in self.last_lines())
        return EngineDied(f"{self.name} (pid {self.pid}) {what}. Its output is in {self.log}; the last of it:\n{lines}")

    def last_lines(self) -> list[str]:
        with self.log.open(errors="replace") as output:
            return [line.rstrip() for line in deque(output, maxlen=LAST_LINES)]

    def _end(self) -> None:
        """End the process and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"signal {name}" + (" (out of memory, perhaps)" if name == "SIGKILL" else "")
    return f"exit code {code}"


def raise_in_parent(error: BaseException) -> Exception:
    """What of an error in the engine process goes to the trainer: user errors as they are, others as text."""
    if isinstance(error, UserError):
        return error
    return RuntimeError(f"{type(error).__name__}: {error}")
