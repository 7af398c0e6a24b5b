"""What a rank has of a rollout replica: the process of it that lives on its node, if this rank holds that, and the
sender that brings the replica's worker on this rank's device its weights."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from verl.errors import UserError, portable
from verl.rollout.client.backend import Backend, EngineDied, GenerateRequest, TokenChunk
from verl.rollout.replicas.layout import ReplicaRanks
from verl.rollout.weights.checksums import Piece, differences
from verl.rollout.weights.sender import Endpoint, ReceiverLost, Session, WeightSender

Weights = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Place:
    """What the others of a replica have to know of a rank.

    sender: of weights to the worker on its device. rendezvous: "host:port" that is free on its node.
    """

    sender: Endpoint | None
    gpu: str | None
    rendezvous: str


@dataclass(frozen=True)
class Outcome:
    """Of a weight update, on one rank. death: of the engine. refusal: names or shapes that are not the engine's.
    seconds: of its sender (``Session.seconds``), and "model": all the rest, which is waiting for other ranks, and
        getting the model here and away again where it was elsewhere."""

    death: str = ""
    refusal: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


def _outcome_of(error: ReceiverLost | UserError) -> Outcome:
    died = isinstance(error, (EngineDied, ReceiverLost))
    return Outcome(death=str(error)) if died else Outcome(refusal=str(error))


class Starter(Protocol):
    def __call__(self, places: Sequence[Place]) -> Backend:
        """The rank's process of the replica, up; places: of the replica's ranks."""
        ...


@dataclass(frozen=True)
class Running:
    """An engine's process. number: each start makes another, so that what an old client orders reaches no newer one."""

    number: int
    backend: Backend
    reports: Reports


class EngineHost:
    """place: of this rank, with a port that is free now. start: makes this rank's process. weights: the actor's, a
    collective of all ranks. loaded: brings the actor to the device for a while. sender: to the replica's worker here;
    None: for an engine that holds no weights of its own. warnings: that ``start`` adds to, for the user.
    """

    def __init__(
        self,
        rank: int,
        replica: ReplicaRanks,
        place: Callable[[], Place],
        start: Starter,
        *,
        sender: WeightSender | None = None,
        weights: Callable[[], Weights] | None = None,
        loaded: Callable[[], AbstractContextManager[Any]] | None = None,
        warnings: list[str] | None = None,
    ):
        self.warnings = [] if warnings is None else warnings
        self.rank, self.replica, self._place = rank, replica, place
        self._start, self._sender, self._weights, self._loaded = start, sender, weights, loaded
        self._running: Running | None = None
        self._number = 0  # of the last start
        # The system ends an engine's process with the thread that started it, so that thread has to stay.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="engine starter")

    # ---- the process

    def place(self) -> Place:
        return self._place()

    def start(self, places: Sequence[Place]) -> dict[str, Any] | None:
        """Facts about the engine, if this rank holds a process of it. places: of all ranks."""
        if self.rank not in self.replica.hosts:
            return None
        self.stop(self._number)
        of_replica = [places[rank] for rank in self.replica.ranks]
        backend = self._starter.submit(self._start, of_replica).result()
        self._number += 1
        self._running = Running(self._number, backend, Reports())
        backend.listen(self._running.reports)
        return {
            "number": self._number,
            "capabilities": backend.capabilities,
            "keeps_weights": backend.keeps_weights,
            "describe": getattr(backend, "describe", str)() if self._first else "",
            "pid": getattr(getattr(backend, "process", None), "pid", os.getpid()),
            "end_tokens": sorted(getattr(backend, "end_tokens", ())),
            "warnings": list(self.warnings),
        }

    def stop(self, number: int) -> None:
        """End the engine of this number, if it is still the one that is there."""
        running = self._running
        if running is not None and number == running.number:
            self._running = None
            running.reports.end()
            running.backend.close()

    def close(self) -> None:
        self.stop(self._number)
        self._starter.shutdown()
        if self._sender is not None:
            self._sender.close()

    @property
    def _first(self) -> bool:
        return self.rank == self.replica.first

    def _engine(self, number: int) -> Running:
        if self._running is None or number != self._running.number:
            raise EngineDied(f"{self.replica.name}: this engine is gone")
        return self._running

    # ---- orders of the driver, to the replica's first rank. number: of the engine that they are for

    def generate_and_abort(self, number: int, orders: Sequence[Sequence[GenerateRequest] | Sequence[str]]) -> None:
        """In this order: draws to start, or ids of draws to recall."""
        backend = self._engine(number).backend
        for order in orders:
            if isinstance(order[0], GenerateRequest):
                backend.generate(order)  # type: ignore[arg-type]
            else:
                backend.abort(order)  # type: ignore[arg-type]

    def reports(self, number: int, wait: float) -> list[tuple[Any, ...]]:
        """What was reported since the last call, as soon as there is something, or nothing after ``wait`` seconds."""
        return self._engine(number).reports.take(wait)

    def order(self, number: int, name: str, *args: Any) -> Any:
        """sleep, wake, drop_cache, health."""
        return getattr(self._engine(number).backend, name)(*args)

    # ---- weights: collectives of all ranks. Engines that do not take part, or fail, hold nobody up

    def send_weights(self, version: int, pids: Mapping[int, Mapping[int, int]]) -> Outcome:
        """pids: of the engines that take part: replica -> rank that holds a process -> its pid."""
        assert self._weights is not None
        assert self._loaded is not None
        started, seconds = time.perf_counter(), dict[str, float]()
        with self._loaded():
            stream = self._weights()
            try:
                if self.replica.index in pids:
                    seconds = self._send(stream, version, pids[self.replica.index])
            except (ReceiverLost, UserError) as error:
                return _outcome_of(error)
            finally:
                for _ in stream:  # the others gather it, too
                    pass
        if seconds:
            seconds["model"] = time.perf_counter() - started - sum(seconds.values())
        return Outcome(seconds=seconds)

    def _send(self, stream: Weights, version: int, pids: Mapping[int, int]) -> dict[str, float]:
        """Gives the seconds by what they went into."""
        if self._first:
            backend = self._engine(self._number).backend
            backend.update_weights(stream, version)
            return dict(backend.update_seconds)
        assert self._sender is not None
        with self._session(pids) as session:
            session.load(stream)
        return session.seconds

    def _session(self, pids: Mapping[int, int]) -> AbstractContextManager[Session]:
        """With the worker on this rank's device, as long as the engine's process on this node is there."""
        assert self._sender is not None
        pid = pids[self.replica.host_of(self.rank)]
        return self._sender.session(lambda: _is_there(pid))

    def pieces(self, pids: Mapping[int, Mapping[int, int]]) -> list[Piece] | Outcome:
        """What the worker on this rank's device holds, with checksums; nothing where the replica does not take part."""
        if self.replica.index not in pids:
            return []
        try:
            if self._first:
                return self._engine(self._number).backend.pieces()[0]  # type: ignore[attr-defined]
            with self._session(pids[self.replica.index]) as session:
                return session.pieces()[0]
        except (ReceiverLost, UserError) as error:
            return _outcome_of(error)

    def compare(self, pieces: Mapping[int, Sequence[Sequence[Piece]]]) -> list[str]:
        """pieces: of each replica, by tensor-parallel rank. The replica's first rank says which differ, and how."""
        assert self._weights is not None
        assert self._loaded is not None
        with self._loaded():
            stream = self._weights()
            if self._first and self.replica.index in pieces:
                return differences(stream, pieces[self.replica.index])
            for _ in stream:
                pass
        return []


class Reports:
    """A listener that keeps what it hears until it is asked for."""

    def __init__(self) -> None:
        self._heard: list[tuple[Any, ...]] = []
        self._over = False
        self._news = threading.Condition()

    def received(self, reports: Sequence[TokenChunk]) -> None:
        self._hear("received", list(reports))

    def failed(self, request_id: str, error: Exception) -> None:
        self._hear("failed", request_id, portable(error))

    def died(self, error: EngineDied) -> None:
        self._hear("died", str(error))

    def _hear(self, *report: Any) -> None:
        with self._news:
            self._heard.append(report)
            self._news.notify_all()

    def end(self) -> None:
        """Nobody has to wait for more."""
        with self._news:
            self._over = True
            self._news.notify_all()

    def take(self, wait: float) -> list[tuple[Any, ...]]:
        with self._news:
            self._news.wait_for(lambda: self._heard or self._over, wait)
            heard, self._heard = self._heard, []
            return heard


def _is_there(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
