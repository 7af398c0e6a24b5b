"""An engine in a process of its own, as a backend of ``ClientEngine``: what does not depend on which engine it is.

A replica that spans nodes has a process on each. The first one's is the backend; of the others only their being there
is asked, and their workers come to senders of their own node for weights.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, GenerateRequest, Listener, TokenChunk, WeightStream
from verl.rollout.contract.base import MemoryTag
from verl.rollout.processes.adapter import WHOLE, Adapter, EngineSettings, NodeShare
from verl.rollout.processes.engine_process import EngineProcess
from verl.rollout.weights.checksums import Piece, differences
from verl.rollout.weights.receiver import SENDERS_VARIABLE
from verl.rollout.weights.sender import Endpoint, ReceiverLost, Session, WeightSender

GIB = 1 << 30
START_TIMEOUT = 1800.0  # a first start compiles kernels, or reads a large model from a slow disk
BREAK_TIMEOUT = 30.0  # seconds in which an engine notices that a weight update was broken off


def weight_sender(settings: EngineSettings, receivers: int, bucket_bytes: int) -> WeightSender:
    return WeightSender(
        receivers=receivers,
        device=device_of(settings),
        dtype=getattr(torch, settings.dtype),
        bucket_bytes=bucket_bytes,
    )


def device_of(settings: EngineSettings) -> torch.device:
    """That the process which sends weights works on."""
    return torch.device("cpu") if settings.device == "cpu" else torch.device("cuda", 0)


class SubprocessBackend:
    """See ``verl.rollout.client.backend.Backend``. Returns once the engine is up.

    log: file of its output. bucket_bytes: of one of the two buckets of a weight update.
    part: of the replica. sender, senders: this process's, and where each tensor-parallel rank of the part finds its
        own; None: one is made for all of them.
    """

    def __init__(
        self,
        adapter: Adapter,
        settings: EngineSettings,
        *,
        log: Path,
        bucket_bytes: int = 0,
        environment: dict[str, str] | None = None,
        part: NodeShare = WHOLE,
        sender: WeightSender | None = None,
        senders: Mapping[int, Endpoint] | None = None,
    ):
        self.adapter, self.settings = adapter, settings
        self.keeps_weights, self.capabilities = adapter.keeps_weights(settings), adapter.capabilities(settings)
        self._device = device_of(settings)
        self._slept: dict[MemoryTag, int] = {}  # bytes that each tag gave back
        self._sender = sender or weight_sender(settings, settings.tensor_parallel, bucket_bytes)
        self._own_sender = sender is None
        found = senders or dict.fromkeys(range(settings.tensor_parallel), self._sender.endpoint)
        variables = {SENDERS_VARIABLE: json.dumps({rank: [end.address, end.key] for rank, end in found.items()})}
        self._listener: Listener | None = None
        self.update_seconds: dict[str, float] = {}
        self.process = EngineProcess(
            adapter.server,
            name=f"the {adapter.title} engine",
            log=log,
            environment=adapter.environment(settings, os.environ if environment is None else environment, part)
            | variables,
            on_report=self._reported,
            on_death=self._died,
        )
        try:
            arguments = adapter.arguments(settings, part)
            self.facts: dict[str, Any] = self.process.call("start", arguments, timeout=START_TIMEOUT)
        except BaseException:  # it takes no leave while it starts
            self.process.close(timeout=0)
            self._close_sender()
            raise
        self.end_tokens = frozenset(self.facts.get("end_tokens", ()))

    def describe(self) -> str:
        return self.adapter.describe(self.facts)

    # ---- draws

    def listen(self, listener: Listener) -> None:
        self._listener = listener

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        """SGLang always ends a response at the model's own end tokens, unless it is told to ignore all stop tokens;
        vLLM has no such tokens, and ends at any."""
        return not stop_ids or stop_ids >= self.end_tokens

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self.process.ask("generate", list(requests))

    def abort(self, request_ids: Sequence[str]) -> None:
        self.process.ask("abort", list(request_ids))

    def _reported(self, message: Any) -> None:
        assert self._listener is not None
        reports = [report for report in message[1] if isinstance(report, TokenChunk)]
        self._listener.received(reports)
        for report in message[1]:
            if not isinstance(report, TokenChunk):
                request_id, text = report
                self._listener.failed(request_id, UserError(text))

    def _died(self, error: EngineDied) -> None:
        if self._listener is not None:
            self._listener.died(error)

    # ---- weights and memory

    def update_weights(self, stream: WeightStream, version: int) -> None:
        with self._session(version) as session:
            session.load(stream)
        self.update_seconds = session.seconds

    def check_weights(self, stream: WeightStream) -> list[str]:
        return differences(stream, self.pieces())

    def pieces(self) -> list[list[Piece]]:
        """What each receiver of this process's sender holds, with checksums."""
        with self._session(version=None) as session:
            return session.pieces()

    @contextmanager
    def _session(self, version: int | None) -> Iterator[Session]:
        """The engine's workers, each at the other end of a connection, for as long as this is open."""
        received = self.process.ask("receive_weights", version)
        try:
            with self._sender.session(lambda: self.process.alive() and not received.done()) as session:
                yield session
        except ReceiverLost as error:  # a worker is gone: the engine goes, too, and its output says why
            self.process.wait_for(received, "receive_weights", BREAK_TIMEOUT)
            raise EngineDied(f"{self.process.name} broke off a weight update: {error}") from error
        except BaseException:  # ours, or names that were refused
            with contextlib.suppress(EngineDied, RuntimeError):
                self.process.wait_for(received, "receive_weights", BREAK_TIMEOUT)
            raise
        self.process.wait_for(received, "receive_weights")

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        for tag in sorted(tags):  # the cache first, which goes with the weights in some engines
            before, _ = torch.cuda.mem_get_info(self._device)
            self.process.call("sleep", [tag])
            self._slept[tag] = torch.cuda.mem_get_info(self._device)[0] - before

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        """An engine would be aborted by its allocator where the memory is not there: then it is not asked."""
        needed = sum(self._slept[tag] for tag in tags)
        free, _ = torch.cuda.mem_get_info(self._device)
        if free < needed:
            torch.cuda.synchronize(self._device)
            torch.cuda.empty_cache()
            free, _ = torch.cuda.mem_get_info(self._device)
        if free < needed:
            raise UserError(
                f"{self.process.name} cannot wake: its {' and '.join(tags)} took {needed / GIB:.1f} GiB when it went "
                f"to sleep, and {free / GIB:.1f} GiB of the GPU are free, as this process holds "
                f"{torch.cuda.memory_reserved(self._device) / GIB:.1f} GiB. Lower "
                "actor_rollout_ref.rollout.gpu_memory_utilization, or offload models that are not in use "
                "(param_offload, optimizer_offload)"
            )
        self.process.call("wake", list(tags))

    def drop_cache(self) -> None:
        self.process.call("drop_cache")

    def health(self) -> None:
        self.process.call("health", timeout=60)

    def close(self) -> None:
        self.process.close()
        self._close_sender()

    def _close_sender(self) -> None:
        if self._own_sender:
            self._sender.close()
