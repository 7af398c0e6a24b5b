"""A replica on the ranks, as a backend of the driver's ``ClientEngine``."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, GenerateRequest, Listener, WeightStream
from verl.rollout.contract.base import MemoryTag
from verl.rollout.replicas.layout import ReplicaRanks
from verl.rollout.replicas.weights import RankReader, WeightsOnRanks

REPORT_WAIT = 10.0  # seconds after which a question for reports comes back empty
ORDER_TIMEOUT = 660.0  # seconds; the rank itself gives its engine 300 for each of at most two answers
CLOSE_TIMEOUT = 10.0  # seconds that a rank has to answer what it was asked before the engine was closed

Ask = Callable[..., Any]


class RemoteBackend:
    """See ``verl.rollout.client.backend.Backend``.

    ask: (method, *args, timeout=) of the ``EngineHost`` on the replica's first rank. UserErrors other than the
        engine's death mean that the rank is gone.
    facts: that the engine's start returned. stop: ends the engine on all ranks that hold a process of it.

    Draws and recalls that come while others are on their way go together.
    """

    def __init__(
        self, replica: ReplicaRanks, ask: Ask, facts: dict[str, Any], pids: dict[int, int], stop: Callable[[], None]
    ):
        self.replica, self.facts, self.pids = replica, facts, pids
        self.capabilities, self.keeps_weights = facts["capabilities"], facts["keeps_weights"]
        self._ask, self._stop, self._number = ask, stop, facts["number"]
        self._end_tokens = frozenset(facts["end_tokens"])
        self.update_seconds: Mapping[str, float] = {}
        self._listener: Listener | None = None
        self._orders: queue.SimpleQueue[list[Any]] = queue.SimpleQueue()
        self._over = threading.Event()  # closed, or dead
        self._threads = [
            threading.Thread(target=target, name=f"{replica.name} {what}", daemon=True)
            for target, what in ((self._give, "orders"), (self._hear, "reports"))
        ]

    def listen(self, listener: Listener) -> None:
        self._listener = listener
        for thread in self._threads:
            thread.start()

    # ---- draws

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        """As the engine does; an embedded one ends at any."""
        return not stop_ids or stop_ids >= self._end_tokens

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self._orders.put(list(requests))

    def abort(self, request_ids: Sequence[str]) -> None:
        self._orders.put(list(request_ids))

    def _give(self) -> None:
        while not self._over.is_set():
            orders = [self._orders.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    orders.append(self._orders.get_nowait())
            try:
                if merged := _merged(orders):
                    self._ask("generate_and_abort", self._number, merged)
            except Exception as error:
                return self.fail(error)

    def _hear(self) -> None:
        assert self._listener is not None
        while not self._over.is_set():
            try:
                heard = self._ask("reports", self._number, REPORT_WAIT, timeout=REPORT_WAIT + 30)
            except Exception as error:
                return self.fail(error)
            for kind, *report in heard:
                if self._over.is_set():
                    return
                if kind == "died":
                    return self.fail(EngineDied(report[0]))
                getattr(self._listener, kind)(*report)

    def fail(self, error: Exception) -> None:
        """The engine is gone, or what it lives on. Who does not listen yet finds out by asking."""
        if self._listener is not None and not self._over.is_set():
            self._over.set()
            self._listener.died(error if isinstance(error, EngineDied) else EngineDied(str(error)))

    # ---- weights and memory

    def update_weights(self, stream: WeightStream, version: int) -> None:
        if self.capabilities.holds_weights:
            assert isinstance(stream, WeightsOnRanks | RankReader)
            found = stream.update({self.replica.index: self.pids}, version)[self.replica.index]
            if isinstance(found, Exception):
                raise found
            self.update_seconds = found

    def check_weights(self, stream: WeightStream) -> list[str]:
        if not self.capabilities.holds_weights:
            return []
        assert isinstance(stream, WeightsOnRanks | RankReader)
        found = stream.check({self.replica.index: self.pids})[self.replica.index]
        if isinstance(found, Exception):
            raise found
        return found

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self._order("sleep", list(tags))

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        self._order("wake", list(tags))

    def drop_cache(self) -> None:
        self._order("drop_cache")

    def health(self) -> None:
        self._order("health")

    def _order(self, name: str, *args: Any) -> None:
        try:
            self._ask("order", self._number, name, *args, timeout=ORDER_TIMEOUT)
        except TimeoutError:
            raise EngineDied(f"{self.replica.name} did not answer {name!r} within {ORDER_TIMEOUT:.0f} s") from None

    def close(self) -> None:
        """When it returns, no question is under way: a rank that ends with one would count as lost."""
        self._over.set()
        self._orders.put([])  # nothing, for who waits for orders
        try:
            self._stop()
        except (UserError, TimeoutError):  # the rank is gone, and its engine with it; or nothing moves there
            return
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(CLOSE_TIMEOUT)


def _merged(orders: list[list[Any]]) -> list[list[Any]]:
    """Neighbours of one kind as one."""
    merged: list[list[Any]] = []
    for order in filter(None, orders):
        if merged and isinstance(merged[-1][0], GenerateRequest) == isinstance(order[0], GenerateRequest):
            merged[-1] += order
        else:
            merged.append(list(order))
    return merged
