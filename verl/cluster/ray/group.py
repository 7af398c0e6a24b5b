"""The ranks of a job as Ray actors, and groups of worker objects that live in them.

RayRanks ──── make("worker", ...) ──> RayWorkerGroup: one object on each rank, called together
    └── the end of any of them, or of their patience with each other, ends the run with one message (failure.py)
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.cluster.ray import failure
from verl.cluster.ray.placement import Seat
from verl.cluster.ray.rank import LANES, Answer, Rank
from verl.cluster.ray.tables import packed, unpacked
from verl.data.schema import rows_of, taken
from verl.errors import UserError

START_TIMEOUT = 300.0  # seconds from asking for a process to its first answer
LOOK_EVERY = 1.0  # seconds between looks at ranks that have not answered
GRACE = 10.0  # seconds that the others have to answer after one has failed, before they count as waiting for it
LEAVE_TIMEOUT = 10.0
ENDED = "the ranks have been ended"

Shares = Callable[[pa.Table, int], list[np.ndarray]]
Reads = Mapping[str, Sequence[str]]


class RayRanks:
    """One actor on each seat, and the process group of all of them.

    logs: folder, on each node, of what the ranks print. timeout: seconds that one call may take.
    environment: for the processes. on_failure: called once, from another thread, when the ranks are of no use any more.
    """

    def __init__(
        self,
        seats: Sequence[Seat],
        device: Literal["cpu", "cuda"],
        *,
        logs: Path,
        timeout: float,
        environment: Mapping[str, str] | None = None,
        on_failure: Callable[[UserError], None] = lambda error: None,
    ):
        self.seats, self.logs, self.timeout = list(seats), logs, timeout
        self.world_size = len(seats)
        self.failure: UserError | None = None
        self.pids: list[int] = []
        self._on_failure = on_failure
        self._giving = threading.Lock()  # every rank gets the calls in one order
        self._failing = threading.Lock()
        self._closing = threading.Event()
        self._under_way: list[str] = []  # what all ranks have been given and not all have answered
        self._waiters = ThreadPoolExecutor(32, thread_name_prefix="ray calls")
        actor = ray.remote(concurrency_groups=LANES)(Rank)  # type: ignore[call-overload]
        self.actors = [
            actor.options(
                num_cpus=1,
                num_gpus=1 if device == "cuda" else 0,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(seat.group, seat.bundle),
            ).remote(seat.rank, self.world_size, str(self.log_of(seat.rank)), dict(environment or {}), os.getcwd())
            for seat in seats
        ]
        self._stays = {actor.stay.remote(): rank for rank, actor in enumerate(self.actors)}
        self._watcher = threading.Thread(target=self._watch, name="rank watcher", daemon=True)
        try:
            self.pids = self._join(device)
        except BaseException:
            self.close()
            raise
        self._watcher.start()

    @property
    def alive(self) -> bool:
        return self.failure is None and not self._closing.is_set()

    def log_of(self, rank: int) -> Path:
        return self.logs / f"rank-{rank}.log"

    def _join(self, device: Literal["cpu", "cuda"]) -> list[int]:
        ((address, port),) = self._plain([self.actors[0].rendezvous.remote()])
        return self._plain([actor.join.remote(address, port, device, self.timeout + 60) for actor in self.actors])

    def seen_by(self, path: Path) -> list[bool]:
        """Of each rank: whether its node's file system has it."""
        return self._plain([actor.sees.remote(str(path)) for actor in self.actors])

    def _plain(self, refs: list[Any]) -> list[Any]:
        """The values of calls that answer with them."""
        try:
            return ray.get(refs, timeout=START_TIMEOUT)
        except RayError as error:
            raise UserError(failure.could_not_start(self, error, START_TIMEOUT)) from error

    def make(
        self,
        name: str,
        factory: str,
        *args: Any,
        shares: Shares | None = None,
        reads: Reads | None = None,
        **kwargs: Any,
    ) -> RayWorkerGroup:
        """A group of the objects that ``factory`` ("module:function") makes of (RankContext, *args) on each rank."""
        group = RayWorkerGroup(self, name, shares or even_shares, reads or {})
        made = [actor.make for actor in self.actors]
        self.together(f"make {name}", lambda: [make.remote(name, factory, args, kwargs) for make in made]).result()
        return group

    # ---- calls

    def together(self, what: str, give: Callable[[], list[Any]], timeout: float | None = None) -> Future[list[Any]]:
        """Give a call to all ranks; to no rank do two calls come in another order than to the others. The future holds
        the values of their answers, or the first error. timeout: seconds, where it is not that of all calls."""
        with self._giving:
            if self.failure or self._closing.is_set():
                return _failed_future(self.failure or UserError(ENDED))
            refs = give()
            self._under_way.append(what)
            return self._waiters.submit(self._gathered, what, refs, timeout or self.timeout)

    def _gathered(self, what: str, refs: list[Any], timeout: float) -> list[Any]:
        try:
            return self._wait_for(what, refs, timeout)
        finally:
            self._under_way.remove(what)

    def _wait_for(self, what: str, refs: list[Any], timeout: float) -> list[Any]:
        pending = {ref: rank for rank, ref in enumerate(refs)}
        values: list[Any] = [None] * len(refs)
        failed: tuple[int, Answer] | None = None
        deadline = time.monotonic() + timeout
        while pending:
            if not self.alive:
                raise self.failure or UserError(ENDED)
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=LOOK_EVERY)
            for ref in ready:
                rank = pending.pop(ref)
                try:
                    answer: Answer = ray.get(ref)
                except RayError as error:
                    raise self.lost(rank, what, error) from None
                values[rank] = answer.value
                if not answer.worked and failed is None:
                    failed, deadline = (rank, answer), min(deadline, time.monotonic() + GRACE)
            if pending and time.monotonic() > deadline:
                raise self._out_of_step(what, failed, list(pending.values()), timeout)
        if failed is not None:  # on all ranks, or on one that nobody had to wait for
            rank, answer = failed
            plain = isinstance(answer.value, (UserError, OSError))
            raise answer.value if plain else UserError(failure.raised(self, rank, what, answer, []))
        return values

    def _out_of_step(
        self, what: str, failed: tuple[int, Answer] | None, waiting: list[int], timeout: float
    ) -> UserError:
        if failed is None:
            return self._fail(lambda: failure.hung(self, what, waiting, timeout))
        rank, answer = failed
        return self._fail(lambda: failure.raised(self, rank, what, answer, waiting))

    def ask(self, rank: int, name: str, method: str, *args: Any, timeout: float | None = None) -> Any:
        """One rank's answer to a call that the others take no part in; it does not wait for the rank's work. Raises
        TimeoutError after ``timeout`` seconds if the rank is well, or the failure of the ranks."""
        timeout = timeout or self.timeout
        deadline = time.monotonic() + timeout
        ref = self.actors[rank].ask.remote(name, method, args)
        while not ray.wait([ref], timeout=LOOK_EVERY)[0]:
            if self.failure:
                break
            if self._closing.is_set():
                raise UserError(ENDED)
            if time.monotonic() > deadline:
                if not failure.answers(self, rank):
                    raise self._fail(lambda: failure.hung(self, method, [rank], timeout))
                raise TimeoutError(f"rank {rank} did not answer {method!r} within {timeout:g} s")
        if self.failure:
            raise self.failure
        try:
            answer: Answer = ray.get(ref)
        except RayError as error:
            raise self.lost(rank, method, error) from None
        if not answer.worked:
            raise answer.value
        return answer.value

    # ---- failure

    def lost(self, rank: int, what: str, error: RayError) -> UserError:
        """The failure, once: whoever finds a rank gone tells it."""
        return self._fail(lambda: failure.lost(self, rank, what or ", ".join(self._under_way), error))

    def explain(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """As an exit of a context: an error that follows from the failure of the ranks is not the one to tell."""
        if self.failure is not None and isinstance(error, Exception) and error is not self.failure:
            raise self.failure from error

    def _fail(self, describe: Callable[[], str]) -> UserError:
        with self._failing:
            if self.failure is None and self._closing.is_set():
                return UserError(ENDED)
            if self.failure is None:
                try:
                    text = describe()
                except Exception as error:  # the cluster's head is gone, too, perhaps
                    text = f"the ranks have failed, and Ray does not tell how ({type(error).__name__}: {error})"
                self.failure = UserError(text)
                self._on_failure(self.failure)
            return self.failure

    def _watch(self) -> None:
        """Deaths while nobody waits for an answer."""
        while not self._closing.is_set() and not self.failure:
            ready, _ = ray.wait(list(self._stays), num_returns=1, timeout=LOOK_EVERY)
            for ref in ready:
                if self._closing.is_set():
                    return
                try:
                    ray.get(ref)
                except RayError as error:
                    self.lost(self._stays[ref], "", error)
                return

    def end(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        """As an exit of a context: after an error, or a second Ctrl-C, nobody waits for what the ranks are doing."""
        if kind is not None:
            self.close()

    def close(self) -> None:
        """End the processes, whatever they are doing."""
        if self._closing.is_set():
            return
        self._closing.set()
        for actor in self.actors:
            with contextlib.suppress(RayError):
                ray.kill(actor)
        with contextlib.suppress(RayError):  # until they are gone
            ray.wait(list(self._stays), num_returns=len(self._stays), timeout=LEAVE_TIMEOUT)
        if self._watcher.ident:
            self._watcher.join(LEAVE_TIMEOUT)
        self._waiters.shutdown()  # of calls that nothing holds up any more


class RayWorkerGroup:
    """See ``verl.cluster.base.WorkerGroup``. shares: which rows of a table go to each of so many ranks. reads: the
    columns that a method reads, where it is not all: others stay here."""

    def __init__(self, ranks: RayRanks, name: str, shares: Shares, reads: Reads):
        self._ranks, self._name, self._shares, self._reads = ranks, name, shares, reads
        self.world_size = ranks.world_size

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[list[Any]]:
        return self._call(method, args, kwargs)

    def call_within(self, timeout: float, method: str, *args: Any) -> Future[list[Any]]:
        """``call``, for what may take longer than others, in seconds."""
        return self._call(method, args, {}, timeout)

    def _call(
        self, method: str, args: tuple, kwargs: dict[str, Any], timeout: float | None = None
    ) -> Future[list[Any]]:
        actors, name = self._ranks.actors, self._name
        return self._ranks.together(
            method, lambda: [actor.run.remote(name, method, args, kwargs) for actor in actors], timeout
        )

    def map(self, method: str, table: pa.Table, **kwargs: Any) -> Future[pa.Table]:
        shares = self.shares(table)
        return _then(self._rows(method, table, shares, kwargs), lambda found: _joined(table, shares, found))

    def reduce(self, method: str, table: pa.Table, **kwargs: Any) -> Future[dict[str, float]]:
        return _then(self._rows(method, table, self.shares(table), kwargs), lambda found: found[0])

    def _rows(
        self, method: str, table: pa.Table, shares: list[np.ndarray], kwargs: dict[str, Any]
    ) -> Future[list[Any]]:
        """The rows of a node's ranks are one object of the store, of which each rank reads its own part in place."""
        if method in self._reads:
            table = table.select([name for name in table.column_names if name in self._reads[method]])
        table = rows_of(table, np.concatenate(shares))
        ends = np.cumsum([0, *map(len, shares)]).tolist()
        parts: list[tuple[Any, int, int]] = []  # of each rank: its node's object, its first row there, and how many
        for _, of_node in groupby(range(self.world_size), lambda rank: self._ranks.seats[rank].node):
            ranks = list(of_node)
            first, end = ends[ranks[0]], ends[ranks[-1] + 1]
            rows = ray.put(packed(table.slice(first, end - first)))
            parts += [(rows, ends[rank] - first, len(shares[rank])) for rank in ranks]
        calls, name = list(zip(self._ranks.actors, parts, strict=True)), self._name
        return self._ranks.together(
            method, lambda: [actor.run_rows.remote(name, method, *part, kwargs) for actor, part in calls]
        )

    def shares(self, table: pa.Table) -> list[np.ndarray]:
        return self._shares(table, self.world_size)

    def close(self) -> None:
        if self._ranks.alive:
            self.call("close").result()


def even_shares(table: pa.Table, ranks: int) -> list[np.ndarray]:
    """Rows in their order, in parts of equal size."""
    return np.array_split(np.arange(table.num_rows), ranks)


def _joined(table: pa.Table, shares: list[np.ndarray], found: list[Any]) -> pa.Table:
    """``table`` and the columns that the ranks added to their shares of it."""
    added = pa.concat_tables([unpacked(rows) for rows in found])
    added = taken(added, np.argsort(np.concatenate(shares), kind="stable"))
    for name in added.column_names:
        table = table.append_column(name, added[name])
    return table


def _failed_future(error: UserError) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_exception(error)
    return future


def _then(future: Future[list[Any]], finish: Callable[[list[Any]], Any]) -> Future[Any]:
    result: Future[Any] = Future()
    result.set_running_or_notify_cancel()

    def done(source: Future[list[Any]]) -> None:
        try:
            result.set_result(finish(source.result()))
        except BaseException as error:
            result.set_exception(error)

    future.add_done_callback(done)
    return result
