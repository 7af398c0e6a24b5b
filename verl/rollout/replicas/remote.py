"""A replica on the ranks, as a backend of the driver's ``ClientEngine``."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from verl.errors import UserError
from verl.rollout.backend import Draw, EngineDied, Listener, WeightStream
from verl.rollout.base import MemoryTag
from verl.rollout.replicas.layout import Replica
from verl.rollout.replicas.weights import RankReader, WeightsOnRanks

REPORT_WAIT = 10.0  # seconds after which a question for reports comes back empty
ORDER_TIMEOUT = 300.0

Ask = Callable[..., Any]


class RemoteBackend:
    """See ``verl.rollout.backend.Backend``. ask: (method, *args, timeout=) of the ``EngineHost`` on the replica's first
    rank; UserErrors other than the engine's death mean that the rank is gone. facts: that the engine's start gave.
    stop: ends the engine on all ranks that hold a process of it.

    Draws and recalls that come while others are on their way go together.
    """

    def __init__(
        self, replica: Replica, ask: Ask, facts: dict[str, Any], pids: dict[int, int], stop: Callable[[], None]
    ):
        self.replica, self.facts, self.pids = replica, facts, pids
        self.capabilities, self.keeps_weights = facts["capabilities"], facts["keeps_weights"]
        self._ask, self._stop = ask, stop
        self._end_tokens = frozenset(facts["end_tokens"])
        self._listener: Listener | None = None
        self._orders: queue.SimpleQueue[list[Any] | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._dead = False
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

    def draw(self, draws: Sequence[Draw]) -> None:
        self._orders.put(list(draws))

    def recall(self, draw_ids: Sequence[str]) -> None:
        self._orders.put(list(draw_ids))

    def _give(self) -> None:
        while (first := self._orders.get()) is not None:
            orders = [first]
            with contextlib.suppress(queue.Empty):
                while (another := self._orders.get_nowait()) is not None:
                    orders.append(another)
            try:
                self._ask("draw_and_recall", _merged(orders))
            except Exception as error:
                return self.fail(error)

    def _hear(self) -> None:
        assert self._listener is not None
        while not self._closed.is_set():
            try:
                heard = self._ask("reports", REPORT_WAIT)
            except Exception as error:
                return self.fail(error)
            for kind, *report in heard:
                if kind == "died":
                    return self.fail(EngineDied(report[0]))
                getattr(self._listener, kind)(*report)

    def fail(self, error: Exception) -> None:
        """The engine is gone, or what it lives on."""
        if not self._dead and not self._closed.is_set():
            self._dead = True
            assert self._listener is not None
            self._listener.died(error if isinstance(error, EngineDied) else EngineDied(str(error)))

    # ---- weights and memory

    def update_weights(self, stream: WeightStream, version: int) -> None:
        if self.capabilities.holds_weights:
            assert isinstance(stream, WeightsOnRanks | RankReader)
            if error := stream.update({self.replica.index: self.pids}, version)[self.replica.index]:
                raise error

    def check_weights(self, stream: WeightStream) -> list[str]:
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
        self._ask("order", name, *args, timeout=ORDER_TIMEOUT)

    def close(self) -> None:
        self._closed.set()
        self._orders.put(None)
        with contextlib.suppress(UserError):  # the rank is gone, and its engine with it
            self._stop()


def _merged(orders: list[list[Any]]) -> list[list[Any]]:
    """Neighbours of one kind as one."""
    merged: list[list[Any]] = []
    for order in orders:
        if merged and isinstance(merged[-1][0], Draw) == isinstance(order[0], Draw):
            merged[-1] += order
        elif order:
            merged.append(list(order))
    return merged
