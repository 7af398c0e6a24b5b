"""Runs calls in processes with a time limit. A call that hangs or dies affects no other call.

One supervising thread owns the processes. Each process has its own pipe and at most one item at a time. The thread
therefore knows which item a dead or hanging process was running, and killing one process cannot damage the messages of
another.
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

Call = tuple[Any, Future]  # the item and its Future[CallResult]
START_LIMIT = 120.0  # seconds for a process to start; it may import large packages


@dataclass(frozen=True)
class CallResult:
    """The result of a call.

    failure: None if the call returned ``value``; otherwise ``detail`` describes the failure.
    fatal: the run must stop, since it needs the value.
    begun, ended: start and end of the call by ``time.monotonic``.
    """

    value: Any = None
    failure: Literal["error", "timeout", "died"] | None = None
    detail: str = ""
    fatal: bool = False
    begun: float = field(default=0.0, compare=False)
    ended: float = field(default=0.0, compare=False)


class WorkerPool:
    """Calls ``make(*args)(item)`` for every item, in ``workers`` processes.

    make: a module-level function. Each process calls it once and passes the items to the function that it returns. If
        it raises UserError, ``WorkerPool(...)`` raises it. Items and values must be picklable.
    timeout: seconds that a call may take from its start. After that the process is killed.

    Each process leads a process group, so Ctrl-C at the terminal does not reach it, and killing it also kills the
    processes that it started. It exits when the process that made the pool exits.
    """

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: Iterable[Any], *, workers: int, timeout: float):
        self._make, self._args, self._timeout = make, tuple(args), timeout
        self._pending: deque[Call] = deque()
        self._broken: BaseException | None = None
        self._closing = False
        self._wakeup_sender, self._wakeup = socket.socketpair()
        self._wakeup_sender.setblocking(False)
        self._started = threading.Event()
        self._count, self._workers = workers, list[_Worker]()
        self._thread = threading.Thread(target=self._supervise, name="worker-pool", daemon=True)
        self._thread.start()
        atexit.register(self.close)
        self._started.wait()
        if self._broken:
            self.close()
            raise self._broken

    def submit(self, item: Any) -> Future[CallResult]:
        """Future of the call's result, also if the call fails. The future fails only if no process can be started."""
        if self._closing:
            raise RuntimeError("the pool is closed")
        future: Future[CallResult] = Future()
        self._pending.append((item, future))
        self._wake()
        return future

    def close(self) -> None:
        """Kill every process and cancel all unfinished calls. A second call has no effect."""
        if not self._closing:
            self._closing = True
            self._wake()
            self._thread.join()
            self._wakeup_sender.close()
            self._wakeup.close()
            atexit.unregister(self.close)

    def _wake(self) -> None:
        with suppress(BlockingIOError):  # a full buffer wakes the supervisor as well
            self._wakeup_sender.send(b"!")

    def _supervise(self) -> None:
        try:
            # SIGINT stays blocked in a new process until the process leads its own group (_serve). Python starts its
            # resource tracker with the first process and then unblocks SIGINT, so the tracker is started before.
            resource_tracker.ensure_running()
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            self._workers += (_Worker(self._make, self._args) for _ in range(self._count))
            while not self._closing:
                self._dispatch()
                self._poll()
        except BaseException as error:  # passed on through the futures of the caller
            self._broken = error
        for worker in self._workers:
            if worker.call:
                self._pending.appendleft(worker.call)
                worker.call = None
            worker.kill()
        self._fail_pending()
        self._started.set()
        while not self._closing:
            self._wakeup.recv(1 << 12)
            self._fail_pending()

    def _dispatch(self) -> None:
        for worker in self._workers:
            while self._pending and worker.idle:
                call = self._pending.popleft()
                if call[1].cancelled():
                    continue
                if not worker.start(call, self._timeout):
                    self._pending.appendleft(call)
                    break

    def _poll(self) -> None:
        """Wait for an event. Then read the processes' messages and replace the processes that died or hang."""
        limit = min(worker.deadline for worker in self._workers)
        sources: list[Any] = [self._wakeup, *(worker.pipe for worker in self._workers)]
        ready = wait(sources, None if limit == float("inf") else max(0.0, limit - time.monotonic()))
        if self._wakeup in ready:
            self._wakeup.recv(1 << 12)
        for index, worker in enumerate(self._workers):
            alive = worker.receive() if worker.pipe in ready else time.monotonic() < worker.deadline
            if worker.ready:
                self._started.set()
            if not alive:
                worker.kill()
                if not worker.ready:
                    raise UserError(worker.start_error)
                self._workers[index] = _Worker(self._make, self._args)

    def _fail_pending(self) -> None:
        while self._pending:
            _, future = self._pending.popleft()
            if self._broken is None or self._closing:
                future.cancel()
            elif future.set_running_or_notify_cancel():
                future.set_exception(self._broken)


class _Worker:
    """One process, its current call and the deadline of that call."""

    def __init__(self, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, args), name="verl-worker")
        self.process.start()
        theirs.close()
        self.ready, self.start_error = False, ""
        self.call: Call | None = None
        self.begun = 0.0
        self.deadline, self.limit = time.monotonic() + START_LIMIT, START_LIMIT

    @property
    def idle(self) -> bool:
        return self.ready and self.call is None

    def start(self, call: Call, limit: float) -> bool:
        """False if the process died while idle. The next ``_poll`` sees its closed pipe."""
        self.call, self.limit, self.begun = call, limit, time.monotonic()
        self.deadline = self.begun + limit
        try:
            self.pipe.send(call[0])
        except OSError:
            self.call, self.deadline = None, float("inf")
            return False
        except Exception as error:
            self._finish(CallResult(failure="error", detail=f"the item cannot be sent to a process: {error!r}"))
        return True

    def receive(self) -> bool:
        """Read one message of the process. False if the process died or could not start."""
        try:
            kind, value = self.pipe.recv()
        except Exception:  # the pipe is closed, or the bytes cannot be unpickled
            return False
        if kind == "failed":
            self.start_error = value
            return False
        if kind == "ready":
            self.ready, self.deadline = True, float("inf")
        else:
            self._finish(CallResult(value) if kind == "value" else CallResult(failure="error", detail=value))
        return True

    def kill(self) -> None:
        """Kill the process and its children. Its current call fails as "timeout" or "died"."""
        late = time.monotonic() >= self.deadline
        if pid := self.process.pid:
            with suppress(ProcessLookupError, PermissionError):  # before it is reaped, so that the pid is still valid
                os.killpg(pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.pipe.close()
        exit_text = f"its process ended with {_exit_text(self.process.exitcode)}"
        ended = f"took longer than {self.limit:g} s" if late else exit_text
        if self.ready:
            self._finish(CallResult(failure="timeout" if late else "died", detail=ended))
        else:
            self.start_error = self.start_error or f"a worker process could not start: {ended}"

    def _finish(self, result: CallResult) -> None:
        call, self.call, self.deadline = self.call, None, float("inf")
        if call is not None and call[1].set_running_or_notify_cancel():
            call[1].set_result(replace(result, begun=self.begun, ended=time.monotonic()))


def _exit_text(code: int | None) -> str:
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"


def _serve(pipe: Connection, make: Callable[..., Callable[[Any], Any]], args: tuple[Any, ...]) -> None:
    """Main function of a worker process: sends "ready", then the value or error of each item."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # discards a SIGINT that is pending since the start
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    signal.signal(signal.SIGINT, signal.default_int_handler)  # inherited by processes that the calls start
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        call = make(*args)
    except UserError as error:
        pipe.send(("failed", str(error)))
        return
    except BaseException as error:
        pipe.send(("failed", f"a worker process could not start:\n{traceback_tail(error)}"))
        return
    pipe.send(("ready", None))
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("value", call(item)))
        except BaseException as error:  # the user's function may raise anything, also SystemExit
            pipe.send(("error", traceback_tail(error)))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def traceback_tail(error: BaseException, lines: int = 12) -> str:
    return "\n".join("".join(traceback.format_exception(error)).rstrip().splitlines()[-lines:])[-4000:]
