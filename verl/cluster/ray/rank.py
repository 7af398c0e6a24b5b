"""The process of one rank, as an actor: it holds named objects, and runs their methods in three lanes.

    work    one call at a time, in the order in which the driver gave them: whatever ranks do together
    aside   calls that no other rank takes part in, and that do not wait for the work
    watch   answers while the rank hangs: what it is doing, and where

Imports no torch: the environment that torch reads is set first.
"""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import importlib
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import ray

from verl.cluster.network import interface_of, listener
from verl.cluster.ray.tables import Rows, packed, unpacked
from verl.errors import portable

LANES = {"aside": 16, "watch": 2}
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, None)  # None: of safetensors
FRAMES = 14  # of a stack, the innermost


@dataclass
class RankContext:
    """Where an object of a rank lives.

    address: of the node. gpu: of those of the node, as CUDA_VISIBLE_DEVICES names it; None without one.
    objects: of this rank, by name; those made before are there.
    """

    rank: int
    world_size: int
    address: str
    gpu: str | None
    objects: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """value: what the method gave, or its error. trace: of the error, as text."""

    worked: bool
    value: Any
    trace: str = ""


class Rank:
    """log: file that takes all that the process and its libraries print. environment: for them. folder: the driver's,
    which relative paths start from."""

    def __init__(self, rank: int, world_size: int, log: str, environment: Mapping[str, str], folder: str):
        os.environ.update(environment)
        with contextlib.suppress(OSError):  # another node may not have it
            os.chdir(folder)
        _print_to(Path(log))
        faulthandler.enable()
        gpus = ray.get_runtime_context().get_accelerator_ids().get("GPU", [])
        self._context = RankContext(rank, world_size, ray.util.get_node_ip_address(), gpus[0] if gpus else None)
        if gpus:  # Ray has set it, unless it was told not to
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus[0]
        self._listener: socket.socket | None = None
        self._work: tuple[str, float, int] | None = None  # the call under way, since when, in which thread

    # ---- work

    def rendezvous(self) -> tuple[str, int]:
        """Address and port where the ranks may meet, if this is the first of them. Nobody else's address listens."""
        self._listener = listener(self._context.address)
        return self._context.address, self._listener.getsockname()[1]

    def join(self, address: str, port: int, device: Literal["cpu", "cuda"], timeout: float) -> int:
        """Be one of the ranks that meet there; timeout: seconds, of any collective. Gives the process id."""
        interface = interface_of(self._context.address)
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, interface)
        import torch.distributed as dist

        here, patience = self._context, timedelta(seconds=timeout)
        fd = self._listener.detach() if self._listener else None
        store = dist.TCPStore(address, port, here.world_size, here.rank == 0, patience, master_listen_fd=fd)
        backend = "gloo" if device == "cpu" else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=store, rank=here.rank, world_size=here.world_size, timeout=patience)
        return os.getpid()

    def sees(self, path: str) -> bool:
        """Whether this node's file system has it."""
        return os.path.exists(path)

    def make(self, name: str, factory: str, args: tuple, kwargs: dict[str, Any]) -> Answer:
        """factory: "module:function", called with (here, *args)."""

        def build() -> None:
            module, _, attribute = factory.partition(":")
            self._context.objects[name] = getattr(importlib.import_module(module), attribute)(
                self._context, *args, **kwargs
            )

        return self._carry_out(f"make {name}", build)

    def run(self, name: str, method: str, args: tuple, kwargs: dict[str, Any]) -> Answer:
        return self._carry_out(method, lambda: getattr(self._context.objects[name], method)(*args, **kwargs))

    def run_rows(self, name: str, method: str, rows: Rows, first: int, count: int, kwargs: dict[str, Any]) -> Answer:
        """A method that takes rows: ``count`` of these, from ``first`` on. If it answers with rows, the columns that it
        added go back."""

        def run() -> Any:
            given = unpacked(rows).slice(first, count)
            found = getattr(self._context.objects[name], method)(given, **kwargs)
            if not isinstance(found, pa.Table):
                return found
            return packed(found.select([column for column in found.column_names if column not in given.column_names]))

        return self._carry_out(method, run)

    def _carry_out(self, what: str, work: Callable[[], Any]) -> Answer:
        self._work = what, time.monotonic(), threading.get_ident()
        try:
            return _answer(work)
        finally:
            self._work = None
            sys.stdout.flush()
            sys.stderr.flush()

    # ---- aside

    @ray.method(concurrency_group="aside")
    def ask(self, name: str, method: str, args: tuple) -> Answer:
        return _answer(lambda: getattr(self._context.objects[name], method)(*args))

    # ---- watch

    @ray.method(concurrency_group="watch")
    def stay(self) -> None:
        """Never returns: its error says that the rank is gone."""
        threading.Event().wait()

    @ray.method(concurrency_group="watch")
    def doing(self) -> str:
        """The work under way, and the innermost frames of its thread."""
        work = self._work
        if work is None:
            return "waits for its next call"
        what, since, thread = work
        frame = sys._current_frames().get(thread)
        stack = traceback.format_list(traceback.extract_stack(frame)[-FRAMES:]) if frame else []
        return f"is in {what!r}, for {time.monotonic() - since:.0f} s:\n" + "".join(stack).rstrip()


def _answer(work: Callable[[], Any]) -> Answer:
    try:
        return Answer(True, work())
    except Exception as error:
        traceback.print_exc()
        full_disk = isinstance(error, OSError) and error.errno in FULL_DISK  # which a run survives
        return Answer(False, error if full_disk else portable(error), traceback.format_exc())


def _print_to(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
