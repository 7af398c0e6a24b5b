"""A rollout engine whose tokens are drawn elsewhere. Whatever draws them, this much is done here, once:

    generate() ──> rows ──(not paused)──> draws ──> backend ──> reports ──> rows ──> results
                    ^                                              │
                    └───────── pause(): recalled, kept ────────────┘

A pause recalls the draws under way and keeps what they have; resume draws the rest with prompt and partial response
as the new prompt. So a weight update in between never meets keys and values of old weights, whatever an engine's own
pause would do. Stop strings are watched here, as are stop tokens that an engine cannot end a response with.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from verl.rollout.client.backend import Backend, EngineDied, GenerateRequest, TokenChunk, WeightStream
from verl.rollout.contract.base import MemoryTag, Request, Result
from verl.rollout.contract.requests import check_ids, check_request
from verl.rollout.contract.sequence import TokenSequence
from verl.rollout.contract.states import EngineState

Answer = TypeVar("Answer")

CLOSE_TIMEOUT = 20.0  # seconds
NO_WEIGHTS = "it has not been given the actor's weights yet"
LOOK_EVERY = 30.0  # seconds between looks at an engine that is drawing
# Of all clients of this process: an order to end a draw that comes late must not meet one of another client.
_REQUEST_NUMBERS = itertools.count()


class ClientEngine:
    """See ``verl.rollout.contract.base.RolloutEngine``.

    tokenizer: for stop strings. eos_token_ids, max_model_len: as for the embedded engine; vocab_size: of the model.
    no_weights: why there is nothing to generate with before the first weight update; None if there is.
    version: of the weights that the engine starts with.
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: Any = None,
        *,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        vocab_size: int,
        no_weights: str | None = None,
        version: int = 0,
    ):
        self.backend, self.version = backend, version
        self.capabilities = replace(backend.capabilities, stop_strings=tokenizer is not None)
        self._tokenizer, self._eos = tokenizer, frozenset(eos_token_ids)
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self._state = EngineState(backend.capabilities, backend.keeps_weights, no_weights)
        self._lock = threading.RLock()  # the backend reports from another thread
        self._rows: dict[str, TokenSequence] = {}  # in flight, by request id
        self._running: dict[str, TokenSequence] = {}  # under way in the backend, by draw id
        self._running_id: dict[TokenSequence, str] = {}
        self._aborting: dict[str, Future[None]] = {}  # ended once the draw has
        self._death: EngineDied | None = None
        self._looked = time.monotonic()
        backend.listen(self)

    # ---- requests

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        rows: list[TokenSequence] = []
        try:
            with self._lock, self._order("generate"):
                self._state.check_generate()
                rows = [self._row(request) for request in requests]
                ids = [request.id for request in requests]
                check_ids(ids, self._rows)
                self._rows.update(zip(ids, rows, strict=True))
                if not self._state.paused:
                    self._launch(rows)
            return await self._results(rows)
        finally:  # also when the caller is cancelled
            self._forget(rows)

    async def _results(self, rows: Sequence[TokenSequence]) -> list[Result]:
        """An engine that hangs is found out by its health: that is its end, and the rows', as for any other death."""
        results = asyncio.gather(*(asyncio.wrap_future(row.future) for row in rows))
        results.add_done_callback(_seen)
        try:
            while True:
                await asyncio.wait([results], timeout=LOOK_EVERY)
                if results.done():
                    return results.result()
                if time.monotonic() - self._looked > LOOK_EVERY:
                    self._looked = time.monotonic()  # one of many callers looks
                    await asyncio.to_thread(self._look)
        finally:
            results.cancel()

    def _look(self) -> None:
        with contextlib.suppress(EngineDied):
            self._check_health()

    def _check_health(self) -> None:
        with self._order("health"):
            self.backend.health()

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        with self._lock:
            chosen = list(self._rows.values()) if ids is None else [self._rows[id] for id in ids if id in self._rows]
            ended = self._abort_running(chosen)
        try:
            await _all(ended)
        finally:  # also when our own caller has no more patience: who waits for these rows is to get them
            with self._lock:
                self._abort_running(chosen)  # one may have been resumed in the meantime
                for row in chosen:
                    self._end(row, "abort")

    async def pause(self) -> None:
        with self._lock, self._order("pause"):
            self._state.check_pause()
            self._state.paused = True
            ended = self._abort_running(list(self._rows.values()))
        await _all(ended)

    async def resume(self) -> None:
        with self._lock, self._order("resume"):
            self._state.check_resume(len(self._running))
            self._launch(list(self._rows.values()))
            self._state.paused = False

    # ---- weights and memory. The backend is idle in all of them: nothing is in flight, or all of it was recalled

    async def update_weights(self, stream: WeightStream, version: int) -> None:
        """The transfer runs in a thread: other coroutines of the event loop advance meanwhile."""

        def update() -> None:
            self._drop_cache()
            self._state.no_weights = "its last weight update did not end well"
            self.backend.update_weights(stream, version)
            self._state.no_weights, self.version = None, version

        await self._in_thread("update_weights", self._check_update, update)

    def _check_update(self, order: str) -> None:
        self._state.check_update(order, len(self._rows), len(self._running))

    @property
    def update_seconds(self) -> Mapping[str, float]:
        return self.backend.update_seconds

    async def check_weights(self, stream: WeightStream) -> list[str]:
        return await self._in_thread("check_weights", self._check_update, lambda: self.backend.check_weights(stream))

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        def sleep() -> None:
            if tags:
                self._drop_cache()
                self.backend.sleep(tags)
                self._state.slept(tags)

        def check(order: str) -> None:
            self._state.check_sleep(tags, len(self._rows), len(self._running))

        await self._in_thread("sleep", check, sleep)

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        def wake() -> None:
            if tags:
                self.backend.wake(tags)
                self._state.woke(tags)

        await self._in_thread("wake", lambda order: self._state.check_wake(tags), wake)

    async def health(self) -> None:
        await asyncio.to_thread(self._check_health)

    async def close(self) -> None:
        """An engine that hangs is given CLOSE_TIMEOUT to hand out what it has drawn."""
        if self._state.closed:
            return
        self._state.closed = True
        try:
            if self._death is None:
                with contextlib.suppress(EngineDied, TimeoutError):
                    await asyncio.wait_for(self.abort(), CLOSE_TIMEOUT)
        finally:
            self.backend.close()

    # ---- what the backend reports

    def received(self, reports: Sequence[TokenChunk]) -> None:
        with self._lock:
            for report in reports:
                if row := self._running.get(report.id):
                    self._take(row, report)
                if report.finish and (ended := self._aborting.pop(report.id, None)):
                    ended.set_result(None)

    def failed(self, request_id: str, error: Exception) -> None:
        with self._lock:
            if row := self._running.get(request_id):
                self._landed(row)
                self._rows.pop(row.request.id, None)
                row.fail(error)
            if ended := self._aborting.pop(request_id, None):
                ended.set_result(None)

    def died(self, error: EngineDied) -> None:
        with self._lock:
            self._death = error
            rows = list(self._rows.values())
            for table in (self._rows, self._running, self._running_id):
                table.clear()
            for row in rows:
                row.fail(error)
            for ended in self._aborting.values():
                ended.set_result(None)
            self._aborting.clear()

    # ---- rows and draws

    def _row(self, request: Request) -> TokenSequence:
        prompt = np.array(request.prompt_ids, np.int64)
        check_request(request, prompt, self.capabilities, self._max_model_len, self._vocab_size)
        return TokenSequence.of(request, _promise(), prompt, self._eos, self._tokenizer)

    def _launch(self, rows: Sequence[TokenSequence]) -> None:
        requests = []
        for row in rows:
            request = GenerateRequest(
                id=f"{next(_REQUEST_NUMBERS):016x}",
                prompt_ids=[*row.prompt.tolist(), *row.ids],
                max_new_tokens=row.request.sampling.max_new_tokens - len(row.ids),
                sampling=row.request.sampling,
                stop_ids=row.stop_ids,
                stream=row.watch is not None or not self.backend.stops_at(row.stop_ids),
                images=row.request.images,
            )
            self._running[request.id], self._running_id[row] = row, request.id
            requests.append(request)
        try:
            if requests:
                self.backend.generate(requests)
        except BaseException:
            for row in rows:
                self._landed(row)
            raise

    def _take(self, row: TokenSequence, report: TokenChunk) -> None:
        if reason := row.take_all(report.ids, report.log_probs, self.version):
            if not report.finish:  # the engine does not know that it is over
                self.backend.abort([report.id])
            return self._end(row, reason)
        if report.finish:
            self._landed(row)
            if report.id not in self._aborting:  # nobody asked for its end: the engine ran out of something
                self._end(row, report.finish)

    def _abort_running(self, rows: Sequence[TokenSequence]) -> list[Future[None]]:
        """Ask for the end of these rows' draws; the futures tell when they have ended."""
        ids = [self._running_id[row] for row in rows if row in self._running_id]
        for id in ids:
            self._aborting.setdefault(id, _promise())
        if ids:
            self.backend.abort(ids)
        return [self._aborting[id] for id in ids]

    def _landed(self, row: TokenSequence) -> None:
        if id := self._running_id.pop(row, None):
            self._running.pop(id, None)

    def _end(self, row: TokenSequence, reason: Any) -> None:
        if self._rows.get(row.request.id) is row:  # another request may have taken over the id of one that ended
            del self._rows[row.request.id]
            self._landed(row)
            row.finish(reason)

    def _forget(self, rows: Sequence[TokenSequence]) -> None:
        with self._lock:
            rows = [row for row in rows if self._rows.get(row.request.id) is row]
            if self._death is None:
                with contextlib.suppress(EngineDied):  # the caller leaves for a reason of its own
                    self._abort_running(rows)
            for row in rows:
                del self._rows[row.request.id]
                self._landed(row)

    # ---- state

    def _drop_cache(self) -> None:
        if "kv_cache" in self._state.awake:
            self.backend.drop_cache()

    async def _in_thread(self, order: str, check: Callable[[str], None], work: Callable[[], Answer]) -> Answer:
        """``work()`` in a thread, after ``check(order)``. Until it returns, other orders that need the engine for
        themselves raise IllegalState, also if the caller is cancelled before."""
        with self._lock, self._order(order):
            check(order)
            self._state.busy = order

        def run() -> Answer:
            try:
                with self._order(order):
                    return work()
            finally:
                self._state.busy = None

        return await asyncio.to_thread(run)

    @contextmanager
    def _order(self, order: str) -> Iterator[None]:
        """An engine that is lost in one order is lost for all: nobody waits for it any more."""
        self._state.check_open(order)
        if self._death:
            raise EngineDied(str(self._death))
        try:
            yield
        except EngineDied as error:
            self.died(error)
            raise


def _seen(results: asyncio.Future[Any]) -> None:
    """A caller that is cancelled as the results fail has no use for the error: asyncio is not to print it."""
    if not results.cancelled():
        results.exception()


def _promise() -> Future[Any]:
    """A future that those who wait for it cannot cancel: the backend's thread sets it without asking."""
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()
    return future


async def _all(futures: Sequence[Future[None]]) -> None:
    await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
