"""A process of our own and the loop that it runs: answers, errors, and every way in which either side may end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from verl.errors import LAST_LINES, UserError
from verl.rollout.client.backend import EngineDied
from verl.rollout.contract.base import Unsupported
from verl.rollout.processes.engine_process import EngineProcess

ROOT = Path(__file__).parents[2]

# A server of a few orders, with children of its own.
SERVER = '''
import asyncio, os, signal, subprocess, sys, time
from verl.errors import UserError
from verl.rollout.contract.base import Unsupported
from verl.rollout.processes.order_loop import Orders

class Odd(UserError):
    """Pickles, and cannot be read back."""
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")

class Locked(UserError):
    def __reduce__(self):
        raise TypeError("locked")

def serve():
    orders = Orders()
    children = []

    async def echo(*args):
        return args

    async def later(seconds, value):
        await asyncio.sleep(seconds)
        return value

    async def fail(kind):
        raise {
            "user": UserError("mend this"),
            "unsupported": Unsupported("not here"),
            "value": ValueError("no such thing"),
            "odd": Odd("this", "that"),
            "locked": Locked("a lock"),
            "cancelled": asyncio.CancelledError("enough"),
        }[kind]

    async def unpicklable():
        return lambda: None

    async def report(*messages):
        for message in messages:
            orders.report(message)

    async def block(seconds):
        time.sleep(seconds)

    async def child(kind):
        if kind == "fork":  # which holds the connection, too
            pid = os.fork()
            if not pid:
                time.sleep(60)
                os._exit(0)
            return pid
        children.append(subprocess.Popen(["sleep", "60"]))
        return children[-1].pid

    async def leave(how):
        print("the last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else os._exit(how)

    async def fill_log(lines):
        for line in range(lines):
            print("line", line)
        sys.stdout.flush()

    def goodbye():
        print("goodbye", flush=True)

    asyncio.run(orders.serve({
        "echo": echo, "later": later, "fail": fail, "unpicklable": unpicklable, "report": report, "block": block,
        "child": child, "leave": leave, "fill_log": fill_log,
    }, goodbye))

if __name__ == "__main__":
    serve()
'''


class Started:
    """An engine process under test, and what it told."""

    def __init__(self, folder: Path, module: str = "small_server", log: Path | None = None):
        self.reports: list[Any] = []
        self.deaths: list[EngineDied] = []
        self.told = threading.Event()
        self.engine = EngineProcess(
            module,
            name="the small engine",
            log=log or folder / "logs" / "engine.log",
            environment={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
            on_report=self.take,
            on_death=self.died,
        )

    def take(self, message: Any) -> None:
        if message == ("reports", ["poison"]):
            raise ValueError("a report that makes no sense")
        self.reports.append(message)

    def died(self, error: EngineDied) -> None:
        self.deaths.append(error)
        self.told.set()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("servers")
    (folder / "small_server.py").write_text(SERVER)
    (folder / "torch.py").write_text("Tensor = object")  # no tensors here, and the real one takes a second to import
    return folder


@pytest.fixture
def start(folder) -> Iterator[Callable[..., Started]]:
    started = []

    def one(**options) -> Started:
        started.append(Started(folder, **options))
        return started[-1]

    yield one
    for each in started:
        each.engine.close(timeout=1)


@pytest.fixture(scope="module")
def shared(folder) -> Iterator[Started]:
    """For tests that leave it as it was."""
    started = Started(folder)
    yield started
    started.engine.close()


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(done: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.01)


def assert_nothing_left(started: Started, *children: int) -> None:
    """No process, no zombie of ours, no thread."""
    for pid in (started.engine.pid, *children):
        wait_for(lambda pid=pid: gone(pid))
    assert started.engine.pid not in [child.pid for child in psutil.Process().children()]
    started.engine._reader.join(5)
    assert not started.engine._reader.is_alive()


# --- orders ----------------------------------------------------------------------------------------------------------


def test_answers_come_to_those_who_asked_also_when_they_come_in_another_order(shared):
    engine = shared.engine
    assert engine.call("echo", 1, "two", [3.0]) == (1, "two", [3.0])
    slow, quick = engine.ask("later", 0.3, "slow"), engine.ask("later", 0.0, "quick")
    assert quick.result(5) == "quick"
    assert not slow.done()
    assert slow.result(5) == "slow"
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda value: engine.call("echo", value), range(200))) == [(i,) for i in range(200)]


def test_large_orders_and_answers_come_through(shared):
    payload = os.urandom(5_000_000)
    assert shared.engine.call("echo", payload) == (payload,)


def test_user_errors_of_the_other_side_stay_user_errors_and_others_come_as_text(shared):
    for kind, error, says in (
        ("user", UserError, "^mend this$"),
        ("unsupported", Unsupported, "^not here$"),
        ("odd", UserError, "^this and that$"),  # does not survive the way
        ("locked", UserError, "^a lock$"),
        ("value", RuntimeError, "^ValueError: no such thing$"),
        ("cancelled", RuntimeError, "^CancelledError: enough$"),
    ):
        with pytest.raises(error, match=says):
            shared.engine.call("fail", kind, timeout=5)
    with pytest.raises(RuntimeError, match="pickle"):
        shared.engine.call("unpicklable", timeout=5)
    with pytest.raises(RuntimeError, match="KeyError: 'no_such_order'"):
        shared.engine.call("no_such_order", timeout=5)
    assert "no such thing" in shared.engine.log.read_text()  # with its traceback
    assert shared.engine.call("echo") == ()


def test_an_order_that_cannot_be_sent_is_not_waited_for(shared):
    with pytest.raises(Exception, match="pickle"):
        shared.engine.call("echo", lambda: None)
    assert not shared.engine._answers
    assert shared.engine.call("echo") == ()


def test_reports_of_one_turn_come_together_and_in_order(shared):
    shared.reports.clear()
    shared.engine.call("report", 1, 2)
    shared.engine.call("report", 3)
    shared.engine.call("echo")
    assert shared.reports == [("reports", [1, 2]), ("reports", [3])]


def test_an_answer_that_never_comes_is_an_engine_that_died_and_says_which_order(shared):
    with pytest.raises(EngineDied, match=r"the small engine \(pid \d+\) did not answer 'later' within 0 s"):
        shared.engine.call("later", 0.4, None, timeout=0.1)
    assert shared.engine.call("later", 0.4, "an answer that comes late does no harm") is not None


def test_the_message_of_a_loss_has_the_last_of_the_log(shared):
    shared.engine.call("fill_log", 100)
    with pytest.raises(EngineDied) as caught:
        shared.engine.call("later", 0.2, None, timeout=0.01)
    message = str(caught.value)
    assert str(shared.engine.log) in message
    assert [line.split()[-1] for line in message.splitlines()[1:]] == [str(i) for i in range(100 - LAST_LINES, 100)]


# --- the engine's end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("how", "reason"), [(3, "exit code 3"), ("kill", "signal SIGKILL .out of memory, perhaps.")])
def test_a_death_fails_those_who_wait_tells_why_and_leaves_no_children(start, how, reason):
    started = start()
    engine = started.engine
    children = [engine.call("child", kind) for kind in ("spawn", "fork")]  # of which one holds the connection
    waiting = engine.ask("later", 60, None)
    engine.ask("leave", how)
    with pytest.raises(
        EngineDied, match=rf"ended with {reason} while it was asked to later, leave(?s:.*)the last words"
    ):
        waiting.result(5)
    assert started.told.wait(5)
    assert not engine.alive()
    for _ in range(2):
        with pytest.raises(EngineDied, match=reason):
            engine.call("echo")
    assert_nothing_left(started, *children)
    engine.close()
    engine.close()
    assert [str(death) for death in started.deaths] == [str(engine.death)]


def test_a_death_in_the_start_says_what_the_engine_said(start, folder):
    (folder / "stillborn.py").write_text("print('importing'); raise ImportError('no such kernel')")
    started = start(module="stillborn")
    with pytest.raises(EngineDied, match=r"exit code 1(?s:.*)importing(?s:.*)ImportError: no such kernel"):
        started.engine.call("start", timeout=10)
    assert_nothing_left(started)


def test_a_death_is_told_also_without_its_log(start, tmp_path):
    started = start(log=tmp_path / "engine.log")
    started.engine.call("echo")
    started.engine.log.unlink()
    with pytest.raises(EngineDied, match="exit code 4"):
        started.engine.call("leave", 4, timeout=5)
    assert_nothing_left(started)


def test_a_message_that_cannot_be_taken_is_the_end_of_the_engine_and_not_of_its_reader_alone(start):
    started = start()
    waiting = started.engine.ask("later", 60, None)
    started.engine.ask("report", "poison")
    with pytest.raises(EngineDied, match=r"could not be taken .ValueError: a report that makes no sense"):
        waiting.result(5)
    assert started.told.wait(5)
    assert_nothing_left(started)


# --- closing ---------------------------------------------------------------------------------------------------------


def test_closing_lets_the_engine_leave_and_takes_all_that_it_started(start):
    started = start()
    children = [started.engine.call("child", kind) for kind in ("spawn", "fork")]
    waiting = started.engine.ask("later", 60, None)
    started.engine.close()
    with pytest.raises(EngineDied, match="was closed"):
        waiting.result(0)
    assert started.engine.log.read_text().endswith("goodbye\n")
    assert not started.deaths
    assert_nothing_left(started, *children)


@pytest.mark.parametrize("full", [False, True], ids=["", "with orders that it does not read"])
def test_an_engine_that_is_stopped_is_closed_all_the_same(start, full):
    started = start()
    engine = started.engine
    engine.call("echo")
    children = [engine.call("child", "spawn")]
    os.kill(engine.pid, signal.SIGSTOP)
    blocked = threading.Thread(target=lambda: engine.ask("echo", bytes(5_000_000)), daemon=True)
    if full:
        blocked.start()
        blocked.join(0.2)
        assert blocked.is_alive()
    began = time.monotonic()
    engine.close(timeout=0.2)
    assert time.monotonic() - began < 3
    assert_nothing_left(started, *children)
    if full:
        blocked.join(5)
        assert not blocked.is_alive()


def test_an_engine_that_is_busy_is_given_its_time_and_no_more(start):
    started = start()
    started.engine.call("echo")
    started.engine.ask("block", 60)
    started.engine.close(timeout=0.3)
    assert_nothing_left(started)


def test_starting_and_closing_many_times_leaves_no_file_open(start, folder):
    (folder / "trivial.py").write_text("import sys, os\nos.read(int(sys.argv[1]), 1)")  # until its orders end
    start(module="trivial").engine.close()
    before, threads = psutil.Process().num_fds(), threading.active_count()
    for _ in range(20):
        started = start(module="trivial")
        started.engine.close()
        assert started.engine._process.returncode == 0
    assert psutil.Process().num_fds() == before
    assert threading.active_count() == threads


# --- the trainer's end -----------------------------------------------------------------------------------------------

TRAINER = """
    import os, signal, sys, time
    from pathlib import Path
    from verl.rollout.processes.engine_process import EngineProcess

    engine = EngineProcess(
        "small_server", name="engine", log=Path(sys.argv[1]), environment=os.environ, on_report=print, on_death=print,
    )
    print(engine.pid, engine.call("child", "spawn"), engine.call("child", "fork"), flush=True)
    if sys.argv[2] == "no close":
        raise SystemExit(1)
    if sys.argv[2] == "engine stopped":
        os.kill(engine.pid, signal.SIGSTOP)
    if sys.argv[2] == "child left" and not os.fork():
        time.sleep(60)  # it outlives the trainer, holds the connection, and says nothing
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("how", ["killed", "no close", "engine stopped", "child left"])
def test_when_the_trainer_ends_the_engine_and_all_that_it_started_end_within_seconds(folder, tmp_path, how):
    environment = {**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"}
    trainer = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(TRAINER), str(tmp_path / "log"), how],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with trainer:
        pids = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(pids) == 3
        if how != "no close":
            assert trainer.stdout.readline() == "ready\n"
            assert not any(map(gone, pids))
            trainer.kill()
        trainer.wait(10)
        for pid in pids:
            wait_for(lambda pid=pid: gone(pid))
        if how == "child left":
            os.killpg(trainer.pid, signal.SIGKILL)


def test_an_engine_whose_trainer_is_gone_before_it_has_begun_does_not_begin(folder):
    server = subprocess.run(
        [sys.executable, "-m", "small_server", "0", str(os.getppid())],  # a parent that it does not have
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        stdin=subprocess.PIPE,
        start_new_session=True,
        timeout=30,
        check=False,
    )
    assert server.returncode == 1
