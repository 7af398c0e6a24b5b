"""Calls in processes of their own, each under a time limit: a call that hangs or dies costs itself and nothing else.

One supervising thread owns the processes. Each has a pipe of its own and at most one item at a time, so it is always
known which item a dead or hanging process was at, and killing one cannot harm another's messages.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

from verl.errors import UserError

Call = tuple[Any, Future]  # the item; its Future[Outcome]
START_LIMIT = 120.0  # seconds until a process must be ready: it may import large packages


@dataclass(frozen=True)
class Outcome:
    """What became of a call. failure: None when it returned ``value``; else ``detail`` says more. fatal: the run is not
    to go on without its value. begun, ended: by ``time.monotonic``."""

    value: Any = None
    failure: Literal["error", "timeout", "died"] | None = None
    detail: str = ""
    fatal: bool = False
    begun: float = field(default=0.0, compare=False)
    ended: float = field(default=0.0, compare=False)


class WorkerPool:
    """``make(*args)(item)`` for every item, in ``workers`` processes.

    make: a module-level function, called once in each process; what it returns is called with the items. A UserError
        that it raises comes out of ``WorkerPool(...)``. Items and values must be picklable.
    timeout: seconds a call may take, counted from when a process begins it; then the process is killed.

    Each process leads a process group: Ctrl-C at the terminal does not reach it, and killing it also ends what it has
    started. It ends by itself when the process that made the pool is gone.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: Iterable[Any], *, workers: int, timeout: float):
        self._make, self._args, self._timeout = make, tuple(args), timeout
        self._pending: deque[Call] = deque()
        self._broken: BaseException | None = None
        self._closing = False
        self._bell, self._doorstep = socket.socketpair()
        self._bell.setblocking(False)
        self._started = threading.Event()
        self._count, self._workers = workers, list[_Worker]()
        self._thread = threading.Thread(target=self._supervise, name="worker-pool", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._started.wait()
        if self._broken:
            self.close()
            raise self._broken

    def submit(self, item: Any) -> Future[Outcome]:
        """The outcome of the call, however it ends. The future itself fails only when no process can be started."""
        if self._closing:
            raise RuntimeError("the pool is closed")
        future: Future[Outcome] = Future()
        self._pending.append((item, future))
        self._ring()
        return future

    def close(self) -> None:
        """Kill every process; calls that have not ended are cancelled. Closing twice is no error."""
        if not self._closing:
            self._closing = True
            self._ring()
            self._thread.join()
            self._bell.close()
            self._doorstep.close()
            atexit.unregister(self.close)

    def _ring(self) -> None:
        with suppress(BlockingIOError):  # a full buffer will wake the supervisor as well
            self._bell.send(b"!")

    def _supervise(self) -> None:
        try:
            # Processes start with Ctrl-C held back, until each leads a group of its own (see _serve). Python's
            # resource tracker, which the first would start, lets it through again.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self._workers += (_Worker(self._make, self._args) for _ in range(self._count))
            while not self._closing:
                self._hand_out()
                self._wait()
        except BaseException as error:  # the caller's futures carry it
            self._broken = error
        for worker in self._workers:
            if worker.call:
                self._pending.appendleft(worker.call)
                worker.call = None
            worker.kill()
        self._give_up()
        self._started.set()
        while not self._closing:
            self._doorstep.recv(1 << 12)
            self._give_up()

    def _hand_out(self) -> None:
        for worker in self._workers:
            while self._pending and worker.idle:
                call = self._pending.popleft()
                if call[1].cancelled():
                    continue
                if not worker.begin(call, self._timeout):
                    self._pending.appendleft(call)
                    break

    def _wait(self) -> None:
        """Until something happens; then take what came from the processes, and replace those that died or hang."""
        limit = min(worker.deadline for worker in self._workers)
        sources: list[Any] = [self._doorstep, *(worker.pipe for worker in self._workers)]
        ready = wait(sources, None if limit == float("inf") else max(0.0, limit - time.monotonic()))
        if self._doorstep in ready:
            self._doorstep.recv(1 << 12)
        for index, worker in enumerate(self._workers):
            alive = worker.receive() if worker.pipe in ready else time.monotonic() < worker.deadline
            if worker.ready:
                self._started.set()
            if not alive:
                worker.kill()
                if not worker.ready:
                    raise UserError(worker.broken)
                self._workers[index] = _Worker(self._make, self._args)

    def _give_up(self) -> None:
        while self._pending:
            _, future = self._pending.popleft()
            if self._broken is None or self._closing:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_exception(self._broken)


class _Worker:
    """One process, the call it is at, and until when it may take."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), name="verl-worker")
        self.process.start()
        theirs.close()
        self.ready, self.broken = False, ""
        self.call: Call | None = None
        self.begun = 0.0
        self.deadline, self.limit = time.monotonic() + START_LIMIT, START_LIMIT

    @property
    def idle(self) -> bool:
        return self.ready and self.call is None

    def begin(self, call: Call, limit: float) -> bool:
        """False when the process has died while idle: its closed pipe will say so at the next wait."""
        self.call, self.limit, self.begun = call, limit, time.monotonic()
        self.deadline = self.begun + limit
        try:
            self.pipe.send(call[0])
        except OSError:
            self.call, self.deadline = None, float("inf")
            return False
        except Exception as error:
            self._finish(Outcome(failure="error", detail=f"the item cannot be sent to a process: {error!r}"))
        return True

    def receive(self) -> bool:
        """Take its message; False when it has died instead, or could not start."""
        try:
            kind, value = self.pipe.recv()
        except Exception:  # its end is closed, or what came through is not a message
            return False
        if kind == "broken":
            self.broken = value
            return False
        if kind == "ready":
            self.ready, self.deadline = True, float("inf")
        else:
            self._finish(Outcome(value) if kind == "value" else Outcome(failure="error", detail=value))
        return True

    def kill(self) -> None:
        """Kill it and what it started. Its call, if one was under way, ends as timed out or died."""
        late = time.monotonic() >= self.deadline
        if pid := self.process.pid:
            with suppress(ProcessLookupError, PermissionError):  # before it is reaped: the number is still its own
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        ended = (
            f"took longer than {self.limit:g} s" if late else f"its process ended with {_end(self.process.exitcode)}"
        )
        if self.ready:
            self._finish(Outcome(failure="timeout" if late else "died", detail=ended))
        else:
            self.broken = self.broken or f"a worker process could not start: {ended}"

    def _finish(self, outcome: Outcome) -> None:
        call, self.call, self.deadline = self.call, None, float("inf")
        if call is not None and call[1].set_running_or_notify_cancel():
            call[1].set_result(replace(outcome, begun=self.begun, ended=time.monotonic()))


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(pipe: Connection, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
    """A worker process: say "ready", then answer each item."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # drops one held back since the start
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # for what the calls start
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        call = make(*args)
    except UserError as error:
        pipe.send(("broken", str(error)))
        return
    except BaseException as error:
        pipe.send(("broken", f"a worker process could not start:\n{traceback_tail(error)}"))
        return
    pipe.send(("ready", None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("value", call(item)))
        except BaseException as error:  # a user's function may raise anything, SystemExit too
            pipe.send(("error", traceback_tail(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def traceback_tail(error: BaseException, lines: int = 12) -> str:
    return "\n".join("".join(traceback.format_exception(error)).rstrip().splitlines()[-lines:])[-4000:]
