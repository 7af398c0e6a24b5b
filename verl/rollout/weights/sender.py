"""The trainer's end of a weight update: named tensors go out in buckets.

    stream ──> bucket 0 ─(filled)─> receivers load it ──> free again
          └──> bucket 1 is filled meanwhile

A bucket is filled again only after every receiver has said that its copies out of it are done on the device, not
merely enqueued. A tensor larger than a bucket goes by itself, in a buffer of its own.
"""

from __future__ import annotations

import secrets
import socket
import struct
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

import torch

from verl.errors import UserError
from verl.rollout.client.backend import WeightStream
from verl.rollout.weights.buckets import Place, SharedBuffer, dtype_name, padded
from verl.rollout.weights.checksums import Piece

ARRIVAL_TIMEOUT = 60.0
ANSWER_TIMEOUT = 300  # seconds; a bucket's copies, or the checksums of all that a receiver holds
SOCKET = "weights.sock"
PARTS = ("arrive", "open", "gather", "wait", "close")  # of an update's time


class ReceiverLost(ConnectionError):  # noqa: N818
    """A receiver did not come, has left or does not answer."""


@dataclass(frozen=True)
class Endpoint:
    """Where a receiver finds its sender, on the same node. key: hexadecimal; it is nobody else's business."""

    address: str
    key: str = field(repr=False)


class WeightSender:
    """Waits for ``receivers`` receivers at ``folder``/weights.sock, once for each session.

    device: where the receivers hold their weights. dtype: that they hold, which what is sent is cast to.
    """

    def __init__(self, *, receivers: int, device: torch.device, dtype: torch.dtype | None, bucket_bytes: int):
        self._key, self._receivers = secrets.token_bytes(32), receivers
        self._device, self._dtype, self._bucket_bytes = device, dtype, bucket_bytes
        self._folder = tempfile.TemporaryDirectory(prefix="verl-weights-")  # mode 0700
        self.endpoint = Endpoint(str(Path(self._folder.name) / SOCKET), self._key.hex())
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(self.endpoint.address)
        self._socket.listen(receivers)
        self._socket.settimeout(0.2)

    @contextmanager
    def session(self, alive: Callable[[], bool]) -> Iterator[Session]:
        """alive: whether waiting for receivers still makes sense. Raises ReceiverLost."""
        connections: dict[int, Connection] = {}  # by rank
        started = time.perf_counter()
        try:
            while len(connections) < self._receivers:
                rank, connection = self._arrival(alive)
                connections[rank] = connection
            ordered = [connections[rank] for rank in sorted(connections)]
            session = Session(ordered, self._device, self._dtype, self._bucket_bytes)
            session.seconds["arrive"] = time.perf_counter() - started
            try:
                yield session
            except BaseException:  # whoever keeps the error keeps its session, too, but not the memory
                session.drop_buckets()
                raise
            session.end()
        finally:
            for connection in connections.values():
                connection.close()

    def _arrival(self, alive: Callable[[], bool]) -> tuple[int, Connection]:
        deadline = time.monotonic() + ARRIVAL_TIMEOUT
        while alive() and time.monotonic() < deadline:
            try:
                accepted, _ = self._socket.accept()
            except TimeoutError:
                continue
            if arrived := self._greet(accepted):
                return arrived
        raise ReceiverLost("it did not come for its weights" if alive() else "it is gone")

    def _greet(self, accepted: socket.socket) -> tuple[int, Connection] | None:
        """None for somebody who does not know the key: the receivers may still come."""
        accepted.settimeout(None)
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # of every message: a receiver may hang
            accepted.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", ANSWER_TIMEOUT, 0))
        connection = Connection(accepted.detach())
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            return connection.recv(), connection
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return None

    def close(self) -> None:
        self._socket.close()
        self._folder.cleanup()


@dataclass
class _Due:
    """An order that receivers have not answered. bucket: that it is about. keep: what they read until then."""

    order: str
    bucket: int | None = None
    keep: list[SharedBuffer] = field(default_factory=list)

    def drop(self) -> None:
        for kept in self.keep:
            kept.forget()
        self.keep.clear()


class Session:
    """One conversation with all receivers of an engine.

    seconds: by what they went into: "arrive" (until all receivers are there), "open" (buckets, and their mapping by the
        receivers), "gather" (the stream and copies into buckets), "wait" (for receivers to load), "close".
    """

    def __init__(
        self, connections: list[Connection], device: torch.device, dtype: torch.dtype | None, bucket_bytes: int
    ):
        self._connections, self._device, self._dtype, self._bucket_bytes = connections, device, dtype, bucket_bytes
        self._buffers: list[SharedBuffer] = []
        self._due: deque[_Due] = deque()  # what receivers are still to answer
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def load(self, stream: WeightStream) -> None:
        """Raises UserError naming what the receivers could not place, or hold and were not sent."""
        clock = time.perf_counter()
        self._open_buckets()
        clock = self._spent("open", clock)
        current, places, filled = 0, list[Place](), 0
        for name, tensor in stream:
            tensor = tensor.to(self._dtype) if self._dtype and tensor.is_floating_point() else tensor
            size = tensor.numel() * tensor.element_size()
            if size > self._bucket_bytes:
                self._send_alone(name, tensor)
                continue
            if filled + size > self._bucket_bytes:
                self._send(current, places)
                current, places, filled = 1 - current, [], 0
                clock = self._spent("gather", clock)
                self._await_bucket(current)
                clock = self._spent("wait", clock)
            place = Place(name, tuple(tensor.shape), dtype_name(tensor.dtype), filled)
            place.view(self._buffers[current].tensor).copy_(tensor, non_blocking=True)
            places.append(place)
            filled = padded(filled + size)
        if places:
            self._send(current, places)
        clock = self._spent("gather", clock)
        self._await_all()
        self._ask("loaded")
        self._spent("wait", clock)

    def pieces(self) -> list[list[Piece]]:
        """What each receiver holds, with checksums."""
        return self._ask("checksums")

    def end(self) -> None:
        clock = time.perf_counter()
        self._ask("end")
        self.drop_buckets()
        self._spent("close", clock)

    # ---- buckets

    def drop_buckets(self) -> None:
        for buffer in self._buffers:
            buffer.forget()
        self._buffers.clear()
        while self._due:
            self._due.pop().drop()
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()

    def _open_buckets(self) -> None:
        """The receivers map them while the first is being filled."""
        for _ in range(2):
            self._buffers.append(SharedBuffer(self._bucket_bytes, self._device))
        self._send_order(_Due("open", keep=list(self._buffers)), [buffer.handle for buffer in self._buffers])

    def _send(self, index: int, places: list[Place]) -> None:
        self._finish_copies()
        self._send_order(_Due("load", bucket=index), index, places)

    def _send_alone(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that no bucket holds; one at a time is under way. It is copied: a parameter whose own memory was
        shared would stay shared for as long as it lives, once more with each update."""
        while any(due.order == "load_from" for due in self._due):
            self._await_next()
        place = Place(name, tuple(tensor.shape), dtype_name(tensor.dtype), 0)
        buffer = SharedBuffer(tensor.numel() * tensor.element_size(), self._device)
        due = _Due("load_from", keep=[buffer])
        try:
            place.view(buffer.tensor).copy_(tensor)
            self._finish_copies()
            self._send_order(due, buffer.handle, place)
        except BaseException:
            due.drop()
            raise

    def _send_order(self, due: _Due, *args: Any) -> None:
        self._due.append(due)
        self._tell(due.order, *args)

    def _await_bucket(self, index: int) -> None:
        """Until receivers are done with what this bucket holds, if anything."""
        while any(due.bucket == index for due in self._due):
            self._await_next()

    def _await_all(self) -> None:
        while self._due:
            self._await_next()

    def _await_next(self) -> None:
        """Receivers carry out orders one after the other."""
        due = self._due.popleft()
        try:
            self._answers(due.order)
        finally:
            due.drop()

    def _finish_copies(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _spent(self, on: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[on] += now - since
        return now

    # ---- messages

    def _ask(self, order: str, *args: Any) -> list[Any]:
        self._tell(order, *args)
        return self._answers(order)

    def _tell(self, order: str, *args: Any) -> None:
        for rank, connection in enumerate(self._connections):
            with _speaking(order, rank):
                connection.send((order, args))

    def _answers(self, order: str) -> list[Any]:
        answers = []
        for rank, connection in enumerate(self._connections):
            with _speaking(order, rank):
                worked, value = connection.recv()
            if not worked:
                raise UserError(f"weight update, rank {rank} of the engine: {value}")
            answers.append(value)
        return answers


@contextmanager
def _speaking(order: str, rank: int) -> Iterator[None]:
    try:
        yield
    except BlockingIOError:
        raise ReceiverLost(f"rank {rank} did not answer {order!r} within {ANSWER_TIMEOUT} s") from None
    except (EOFError, OSError) as error:
        raise ReceiverLost(f"rank {rank} left when it was asked to {order!r}") from error
