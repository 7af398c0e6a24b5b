"""An inference engine's own process, as the trainer sees it: orders go in, answers and reports come out, and its death
is a message and not the trainer's. ``verl.rollout.processes.order_loop`` is the other end.

    trainer ── call ──> (socket pair) ──> engine process ──> its workers
       reader thread <── answers, reports ──┘

Nobody else can connect: the socket has no name. The process leads a session of its own, so that a Ctrl-C meant for
the trainer does not reach it, and so that all of its children end with it. The end of the orders is what tells it to
leave: that never waits for room in the socket, as an order may whose reader hangs.
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
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from verl.errors import indented, last_lines
from verl.rollout.client.backend import EngineDied

ANSWER_TIMEOUT = 300.0  # seconds; an order is milliseconds of work, on a machine that is not overloaded
LEAVE_TIMEOUT = 20.0
EXIT_TIMEOUT = 10.0  # from the end of the connection to that of the process


class EngineProcess:
    """Starts ``python -m module`` and speaks to it. To be made in a thread that lives as long as it shall: the system
    ends it with the thread that started it, which is how it never outlives the trainer.

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
        self._closing = self._ended = False
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
        self._socket, self._connection = ours, Connection(os.dup(ours.fileno()))
        self._reader = threading.Thread(target=self._read, name=f"{name} reports", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, order: str, *args: Any, timeout: float = ANSWER_TIMEOUT) -> Any:
        """The answer. Raises what the order raised there (UserErrors as they are), or EngineDied."""
        return self.wait_for(self.ask(order, *args), order, timeout)

    def wait_for(self, answer: Future[Any], order: str, timeout: float = ANSWER_TIMEOUT) -> Any:
        """The answer to an order that was given before, as for ``call``."""
        try:
            return answer.result(timeout)
        except TimeoutError:
            raise self._lost(f"did not answer {order!r} within {timeout:.0f} s") from None

    def ask(self, order: str, *args: Any) -> Future[Any]:
        """Give an order and return at once."""
        future: Future[Any] = Future()
        with self._lock:
            if self.death:
                raise EngineDied(str(self.death))
            number = next(self._numbers)
            self._answers[number] = order, future
            try:
                self._connection.send((number, order, args))
            except OSError:
                pass  # it has just died: the reader says why
            except BaseException:  # not sent, so never answered
                del self._answers[number]
                raise
        return future

    def alive(self) -> bool:
        return self.death is None and self._process.poll() is None

    def close(self, timeout: float = LEAVE_TIMEOUT) -> None:
        """Ask it to leave, and see to it that it does."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout)
        finally:
            self._end()
        self._reader.join(EXIT_TIMEOUT)
        self._socket.close()

    # ---- the reader

    def _read(self) -> None:
        try:
            while True:
                self._take(self._connection.recv())
        except (EOFError, OSError):
            self._gone()
        except Exception as error:  # no further message would be read: who waits for one would wait for ever
            traceback.print_exc()
            self._end()
            self._gone(f"was ended, as a message of it could not be taken ({type(error).__name__}: {error})")

    def _take(self, message: tuple) -> None:
        if message[0] != "answer":
            return self._on_report(message)
        _, number, worked, value = message
        _, future = self._answers.pop(number)
        future.set_result(value) if worked else future.set_exception(value)

    def _gone(self, why: str | None = None) -> None:
        """The process is gone or about to be, with or without our asking."""
        try:
            reason = _reason(self._process.wait(EXIT_TIMEOUT))
        except subprocess.TimeoutExpired:
            reason = "its connection closed"
        self._end()
        with self._lock:
            doing = sorted({order for order, _ in self._answers.values()})
            orders = f" while it was asked to {', '.join(doing)}" if doing else ""
            self.death = self._lost("was closed" if self._closing else why or f"ended with {reason}{orders}")
            answers, self._answers = list(self._answers.values()), {}
            self._connection.close()
        for _, future in answers:
            future.set_exception(self.death)
        if not self._closing:
            self._on_death(self.death)

    def _lost(self, what: str) -> EngineDied:
        told = f"{self.name} (pid {self.pid}) {what}. Its output is in {self.log}; the last of it:"
        return EngineDied(f"{told}\n{indented(chr(10).join(self.last_lines()))}")

    def last_lines(self) -> list[str]:
        try:
            return last_lines(self.log)
        except OSError as error:  # the death itself has to be told all the same
            return [str(error)]

    def _end(self) -> None:
        """End the process and all that it started. Once: later on, the number may be another process's."""
        if not self._ended:
            self._ended = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):  # the system may take its time over a GPU's memory
            self._process.wait(EXIT_TIMEOUT)


def _reason(code: int) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"signal {name}" + (" (out of memory, perhaps)" if name == "SIGKILL" else "")
    return f"exit code {code}"
