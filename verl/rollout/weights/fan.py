"""One stream of tensors for several readers at once, in memory for a few tensors: the slowest reader sets the pace."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from verl.rollout.client.backend import WeightStream

Answer = TypeVar("Answer")

AHEAD = 2  # tensors that a reader may be behind the stream
LOOK_AGAIN = 0.1  # seconds after which the feeder looks whether a reader is still there
_END = object()


@runtime_checkable
class OwnFan(Protocol):
    """A stream that goes to several readers in a way of its own."""

    def fan(self, readers: int) -> Any:
        """What does as ``Fan``."""
        ...


class Fan:
    """``feed`` in one thread, ``run`` in one thread for each reader. A reader that ends early holds nobody up."""

    def __init__(self, readers: int):
        self._queues: list[queue.Queue[Any]] = [queue.Queue(AHEAD) for _ in range(readers)]
        self._gone = [False] * readers
        self._error: BaseException | None = None

    def feed(self, stream: WeightStream) -> None:
        """Until the stream ends, or every reader has. What the stream raises, the readers raise too."""
        try:
            for item in stream:
                for reader in range(len(self._queues)):
                    self._put(reader, item)
                if all(self._gone):
                    return
        except BaseException as error:
            self._error = error
            raise
        finally:
            for reader in range(len(self._queues)):
                self._put(reader, _END)

    def run(self, reader: int, read: Callable[[Iterator[tuple[str, torch.Tensor]]], Answer]) -> Answer:
        try:
            return read(self._items(reader))
        finally:
            self._gone[reader] = True

    def _put(self, reader: int, item: Any) -> None:
        while not self._gone[reader]:
            try:
                return self._queues[reader].put(item, timeout=LOOK_AGAIN)
            except queue.Full:
                continue

    def _items(self, reader: int) -> Iterator[tuple[str, torch.Tensor]]:
        while (item := self._queues[reader].get()) is not _END:
            yield item
        if self._error is not None:
            raise RuntimeError(f"the weights could not be read to their end: {self._error}") from self._error
