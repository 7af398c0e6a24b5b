"""The actor's weights where the ranks hold them and send them: one pass over them serves all replicas.

Router, a thread a replica ──(update, check)──> RankFan ──(all have come, or left)──> one collective of the ranks
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any, Protocol, TypeVar

import torch

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied
from verl.rollout.replicas.host import Outcome
from verl.rollout.replicas.layout import ReplicaRanks

Answer = TypeVar("Answer")
Pids = dict[int, int]  # of an engine's processes, by the rank that holds each


class Hosts(Protocol):
    """The ``EngineHost`` of each rank (a ``WorkerGroup``)."""

    def call(self, method: str, *args: Any) -> Any: ...


class WeightsOnRanks:
    """Stands for the stream: it is not read on the driver, and serves any number of times."""

    def __init__(self, hosts: Hosts, replicas: list[ReplicaRanks]):
        self._hosts, self._replicas = hosts, replicas

    def update(self, asked: dict[int, Pids], version: int) -> dict[int, Exception | Mapping[str, float]]:
        """Send them to these replicas. What went wrong with each, or else the seconds of its ranks, of each kind the
        most."""
        outcomes: list[Outcome] = self._hosts.call("send_weights", version, asked).result()
        of_replicas = {replica: [outcomes[rank] for rank in self._replicas[replica].ranks] for replica in asked}
        return {replica: _error_of(found) or _slowest(found) for replica, found in of_replicas.items()}

    def check(self, asked: dict[int, Pids]) -> dict[int, list[str] | Exception]:
        """How the tensors that each of these replicas holds differ from these."""
        found: list[Any] = self._hosts.call("pieces", asked).result()
        answers: dict[int, Any] = {}
        pieces = {}
        for replica in asked:
            of_replica = [found[rank] for rank in self._replicas[replica].ranks]
            answers[replica] = _error_of([each for each in of_replica if isinstance(each, Outcome)])
            if answers[replica] is None:
                pieces[replica] = of_replica
        lines: list[list[str]] = self._hosts.call("compare", pieces).result()
        return answers | {replica: lines[self._replicas[replica].first] for replica in pieces}

    def fan(self, readers: int) -> RankFan:
        return RankFan(readers, self)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise TypeError("these weights go from the ranks to the engines, and not through the driver")


class RankFan:
    """As ``verl.rollout.weights.fan.Fan``: ``feed`` in one thread, ``run`` in one for each of ``readers``."""

    def __init__(self, readers: int, weights: WeightsOnRanks):
        self._readers, self._weights = readers, weights
        self._asked: dict[int, Pids] = {}  # by replica
        self._versions: set[int | None] = set()  # that they came for; None: checksums
        self._left = 0  # readers that came and went without asking
        self._changed = threading.Condition()
        self._found: Future[dict[int, Any]] = Future()  # by replica

    def feed(self, stream: Any) -> None:
        """What goes wrong, the readers raise."""
        try:
            with self._changed:
                self._changed.wait_for(lambda: len(self._asked) + self._left >= self._readers)
            self._found.set_result(self._pass() if self._asked else {})
        except Exception as error:
            self._found.set_exception(error)
        except BaseException as error:  # an interrupt: nobody waits, and nobody takes it for the end of the pass
            self._found.set_exception(RuntimeError(f"the weights were not sent to their end: {type(error).__name__}"))
            raise

    def _pass(self) -> dict[int, Any]:
        (version,) = self._versions
        if version is None:
            return self._weights.check(self._asked)
        return self._weights.update(self._asked, version)

    def run(self, reader: int, read: Callable[[RankReader], Answer]) -> Answer:
        weights = RankReader(self)
        try:
            return read(weights)
        finally:
            if not weights.asked:
                with self._changed:
                    self._left += 1
                    self._changed.notify_all()

    def ask(self, replica: int, pids: Pids, version: int | None) -> Any:
        with self._changed:
            self._asked[replica] = pids
            self._versions.add(version)
            self._changed.notify_all()
        return self._found.result()[replica]


class RankReader:
    """The weights as one of several replicas reads them, at the same time as the others."""

    def __init__(self, fan: RankFan):
        self._fan, self.asked = fan, False

    def update(self, asked: dict[int, Pids], version: int) -> dict[int, Exception | Mapping[str, float]]:
        return self._ask(asked, version)

    def check(self, asked: dict[int, Pids]) -> dict[int, list[str] | Exception]:
        return self._ask(asked, None)

    def _ask(self, asked: dict[int, Pids], version: int | None) -> dict[int, Any]:
        self.asked = True
        ((replica, pids),) = asked.items()
        return {replica: self._fan.ask(replica, pids, version)}


def _error_of(outcomes: list[Outcome]) -> Exception | None:
    """Of a replica: its death, where any of its ranks saw it, or what it refused."""
    for outcome in outcomes:
        if outcome.death:
            return EngineDied(outcome.death)
    for outcome in outcomes:
        if outcome.refusal:
            return UserError(outcome.refusal)
    return None


def _slowest(outcomes: list[Outcome]) -> dict[str, float]:
    kinds = {kind for outcome in outcomes for kind in outcome.seconds}
    return {kind: max(outcome.seconds.get(kind, 0.0) for outcome in outcomes) for kind in sorted(kinds)}
