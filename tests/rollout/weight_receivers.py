"""What runs in the processes that weights are sent to in ``test_weight_transport``."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from verl.rollout.weights.checksums import Piece, piece_of
from verl.rollout.weights.receiver import NamedTensors, serve_session


class DictHolder:
    """Tensors by name. Only those in ``names``, if there are any. ends_at: the tensor at which this process is over;
    stops_at: at which it is stopped."""

    def __init__(self, names: Sequence[str] = (), ends_at: str = "", stops_at: str = ""):
        self.tensors: dict[str, torch.Tensor] = {}
        self._names, self._signals = names, {ends_at: signal.SIGKILL, stops_at: signal.SIGSTOP}
        self._come: list[str] = []

    def begin(self) -> None:
        self._come = []

    def load(self, tensors: NamedTensors) -> None:
        for name, tensor in tensors:
            if name in self._signals:
                os.kill(os.getpid(), self._signals[name])
            if self._names and name not in self._names:
                raise ValueError(f"{name} has no place here")
            assert name not in self._come
            self._come.append(name)
            self.tensors[name] = tensor.clone()

    def finish(self) -> None:
        if missing := [name for name in self._names if name not in self._come]:
            raise ValueError(f"was not sent {', '.join(missing)}")

    def pieces(self) -> list[Piece]:
        return [piece_of(name, tensor, tensor.shape) for name, tensor in self.tensors.items()]


def receive(control: Connection, address: str, key: bytes, rank: int, options: dict[str, Any]) -> None:
    """A session for each message that comes, then what is held, as {name: (dtype, shape, bytes)}, or the error."""
    holder = DictHolder(**options)
    while control.recv() == "session":
        try:
            serve_session(address, key, rank, holder)
            control.send({name: content(tensor) for name, tensor in holder.tensors.items()})
        except Exception as error:
            control.send(error)


def content(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    flat = tensor.detach().contiguous().view(-1)
    return str(tensor.dtype), tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
