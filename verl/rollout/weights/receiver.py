"""The engine's end of a weight update: what its worker process runs while the trainer sends."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from typing import Any, Protocol

import torch

from verl.rollout.weights.buckets import Place, opened
from verl.rollout.weights.checksums import Piece

SENDERS_VARIABLE = "VERL_WEIGHT_SENDERS"  # JSON: tensor-parallel rank -> [address, key]

NamedTensors = Sequence[tuple[str, torch.Tensor]]


class Holder(Protocol):
    """The parameters of one rank of an engine."""

    def begin(self) -> None:
        """Tensors will come; those of an update that broke off do not count."""
        ...

    def load(self, tensors: NamedTensors) -> None:
        """Take (parts of) these whole tensors. Raises ValueError naming what has no place here."""
        ...

    def finish(self) -> None:
        """All tensors have come. Raises ValueError naming parameters for which none did."""
        ...

    def pieces(self) -> list[Piece]:
        """What is held, from the parameters themselves."""
        ...


def serve_worker(rank: int, holder: Holder) -> None:
    """One session with this rank's sender. What goes wrong raises nothing: it would be the worker's end, and so the
    engine's, and the sender knows already."""
    address, key = json.loads(os.environ[SENDERS_VARIABLE])[str(rank)]
    try:
        serve_session(address, bytes.fromhex(key), rank, holder)
    except (AuthenticationError, EOFError, OSError):
        traceback.print_exc()


def serve_session(address: str, key: bytes, rank: int, holder: Holder) -> None:
    """Until the sender ends it. An order that fails is answered with why; a sender that is gone raises EOFError."""
    with Client(address, family="AF_UNIX", authkey=key) as connection:
        connection.send(rank)
        session = _Session(holder)
        while True:
            order, args = connection.recv()
            worked = _carry_out(connection, session, order, args)
            if order == "end" and worked:
                return


def _carry_out(connection: Connection, session: _Session, order: str, args: tuple) -> bool:
    try:
        connection.send((True, getattr(session, order)(*args)))
        return True
    except Exception as error:
        traceback.print_exc()
        connection.send((False, str(error) or type(error).__name__))
        return False


class _Session:
    """The orders of ``sender.Session``."""

    def __init__(self, holder: Holder):
        self._holder = holder
        self._buckets: list[torch.Tensor] = []

    def open(self, handles: Sequence[Any]) -> None:
        self._buckets = [opened(handle) for handle in handles]
        self._holder.begin()

    def load(self, index: int, places: Sequence[Place]) -> None:
        bucket = self._buckets[index]
        self._holder.load([(place.name, place.view(bucket)) for place in places])
        _synchronize(bucket)

    def load_from(self, handle: Any, place: Place) -> None:
        """A tensor with a buffer of its own."""
        buffer = opened(handle)
        self._holder.load([(place.name, place.view(buffer))])
        _synchronize(buffer)

    def loaded(self) -> None:
        self._holder.finish()

    def checksums(self) -> list[Piece]:
        return self._holder.pieces()

    def end(self) -> None:
        """Leave nothing of the sender's memory mapped."""
        cuda = any(bucket.is_cuda for bucket in self._buckets)
        self._buckets.clear()
        if cuda:
            torch.cuda.ipc_collect()


def _synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
