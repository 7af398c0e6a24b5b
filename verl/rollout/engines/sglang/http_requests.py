"""Draws that are under way on an SGLang server: asked for, read, recalled, and given up when the server is gone.

draw ──> POST /generate ──(an answer, or lots of a stream)──> reports
             │  meanwhile it is asked for a sign of life, now and then
             └─(the connection broke, the server lives)──> once more, from the token that is due
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, GenerateRequest, Listener, TokenChunk
from verl.rollout.engines.sglang.api import SIGN_OF_LIFE, Refused, ServerAPI, Unreachable
from verl.rollout.engines.sglang.sampling_params import sampling_params

MOST_OPEN = 1024  # connections to one server
ATTEMPTS = 3  # at a draw whose connection breaks while the server lives
# A streamed answer repeats all that came before, so tokens come in lots; this many may be drawn past a stop.
STREAM_INTERVAL = 32
OVERLOADED = (502, 503, 504)


@dataclass(frozen=True)
class Times:
    """Seconds. probe_every, probe_timeout: of a look at the server while it draws. dead_after: without a sign of life.
    idle: until it has stopped drawing what it was told to."""

    probe_every: float = 5.0
    probe_timeout: float = 30.0
    dead_after: float = 60.0
    abort_every: float = 0.05
    retry_after: float = 1.0
    idle: float = 60.0
    bucket: float = 300.0
    disk: float = 1800.0


@dataclass(eq=False)
class _UnderWay:
    """A draw. rid: what the server knows it as; None: not sent yet. ids: reported so far."""

    request: GenerateRequest
    task: asyncio.Task[None] | None = None
    rid: str | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    aborted: bool = False


class ServerRequests:
    """Methods without an underscore are for other threads than the event loop's.

    run: what the names of this client's requests begin with. incremental: a streamed answer does not repeat itself.
    weights: the version that every answer has to name; None: any. death: once the server is gone.
    """

    def __init__(self, api: ServerAPI, run: str, times: Times, *, incremental: bool):
        self._api, self._run, self._times, self._incremental = api, run, times, incremental
        self.listener: Listener | None = None
        self.weights: str | None = None
        self.death: EngineDied | None = None
        self._under_way: dict[str, _UnderWay] = {}  # of the event loop, as is all that follows
        self._room = asyncio.Semaphore(MOST_OPEN)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sign = 0.0  # when the server last showed that it lives

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self._api.loop.call_soon_threadsafe(self._start, list(requests))

    def abort(self, request_ids: Sequence[str]) -> None:
        self._api.loop.call_soon_threadsafe(self._abort, list(request_ids))

    def _start(self, requests: Sequence[GenerateRequest]) -> None:
        if self.death:
            return self._tell(lambda listener: listener.died(EngineDied(str(self.death))))
        if not self._under_way:
            self._sign = time.monotonic()
        for request in requests:
            self._under_way[request.id] = work = _UnderWay(request)
            work.task = asyncio.create_task(self._generate(work))
        self._keep_doing("watch", self._watch)

    async def _generate(self, work: _UnderWay) -> None:
        try:
            async with self._room:
                await self._attempts(work)
        except EngineDied as error:
            self._die(error)
        except Exception as error:
            failure = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
            self._tell(lambda listener: listener.failed(work.request.id, failure))
        finally:
            self._under_way.pop(work.request.id, None)

    async def _attempts(self, work: _UnderWay) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            before, work.rid = work.rid, f"{self._run}-{work.request.id}-{attempt}"
            try:
                if before:  # the server may still be drawing for a connection that is gone
                    await self._api.post("/abort_request", {"rid": before})
                return await self._ask(work)
            except (Unreachable, Refused) as error:
                if isinstance(error, Refused) and error.status not in OVERLOADED:
                    raise
                if isinstance(error, Unreachable) and error.refused:
                    raise
                if work.aborted:
                    return self._report(TokenChunk(work.request.id, [], [], "abort"))
                if attempt == ATTEMPTS:
                    raise EngineDied(f"{error}, {ATTEMPTS} times in a row") from error
                await asyncio.sleep(self._times.retry_after * attempt)
                with contextlib.suppress(Refused):  # one that is not well for long is taken out by the watch
                    await self._api.get(SIGN_OF_LIFE, self._times.probe_timeout)

    async def _ask(self, work: _UnderWay) -> None:
        """One answer of the server, from the token that is due."""
        request = work.request
        due = dataclasses.replace(
            request, prompt_ids=[*request.prompt_ids, *work.ids], max_new_tokens=request.max_new_tokens - len(work.ids)
        )
        if not due.max_new_tokens:
            return self._report(TokenChunk(request.id, [], [], "length"))
        sampling = sampling_params(due) | ({"stream_interval": STREAM_INTERVAL} if request.stream else {})
        body = {
            "rid": work.rid,
            "input_ids": due.prompt_ids,
            "sampling_params": sampling,
            "return_logprob": True,
            "stream": request.stream,
        }
        if not request.stream:
            answer = await self._api.post("/generate", body, timeout=None)
            self._take(work, answer, taken=0)
            return
        taken, ended = 0, False
        try:
            async with self._api.client.stream("POST", "/generate", json=body) as response:
                if response.status_code >= 300:
                    self._api.check("/generate", response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        new, ended = self._take(work, json.loads(data), taken)
                        taken += 0 if self._incremental else new
        except httpx.HTTPError as error:
            raise self._api.unreachable("/generate", error) from None
        if not ended:
            raise Unreachable(f"{self._api.url}/generate broke off its answer", refused=False)

    def _take(self, work: _UnderWay, answer: Any, taken: int) -> tuple[int, bool]:
        """Report what an answer has beyond the first ``taken`` tokens: their number, and whether it is the last."""
        request = work.request
        if "error" in answer:
            raise UserError(f"{self._api.url}/generate did not take the request: {answer['error'].get('message')}")
        meta = answer["meta_info"]
        self._check_weights_of(meta)
        new = (meta.get("output_token_logprobs") or [])[taken:]
        ids, log_probs = [entry[1] for entry in new], [entry[0] for entry in new]
        if None in log_probs:  # JSON knows no NaN
            raise UserError(f"{self._api.url} drew a token whose log-prob is not a number: are its weights?")
        reason = meta.get("finish_reason") or {}
        finish = reason.get("type")
        if finish == "abort" and reason.get("status_code"):
            raise Refused(f"{self._api.url}/generate: {reason.get('message')}", int(reason["status_code"]))
        if finish and not request.stream and meta.get("completion_tokens", len(ids)) != len(ids):
            raise UserError(f"{self._api.url} drew {meta['completion_tokens']} tokens and gave {len(ids)} log-probs")
        if finish == "stop" and (not ids or ids[-1] not in request.stop_ids):
            raise UserError(
                f"the SGLang server at {self._api.url} ended a response with {reason.get('matched')!r}, which is none "
                f"of {sorted(request.stop_ids)}: does it serve the model of actor_rollout_ref.model.path?"
            )
        self._sign = time.monotonic()
        work.ids += ids
        if ids or finish:
            self._report(TokenChunk(request.id, ids, log_probs, finish))
        return len(ids), bool(finish)

    def _check_weights_of(self, meta: dict[str, Any]) -> None:
        if self.weights is not None and meta.get("weight_version") != self.weights:
            raise EngineDied(
                f"the SGLang server at {self._api.url} has weights {meta.get('weight_version')!r} and not this run's "
                f"({self.weights}): it was restarted, or another program updates it"
            )

    # ---- recalls

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            if work := self._under_way.get(request_id):
                work.aborted = True
                if work.rid is None and work.task:  # it may not even have begun
                    work.task.cancel()
                    del self._under_way[request_id]
                    self._report(TokenChunk(request_id, [], [], "abort"))
        self._keep_doing("abort", self._send_aborts)

    async def _send_aborts(self) -> None:
        """Again and again: a request that has not reached SGLang's scheduler yet is not there to be aborted."""
        while aborted := [work for work in self._under_way.values() if work.aborted and work.rid]:
            if len(aborted) == len(self._under_way):
                orders: list[dict[str, Any]] = [{"abort_all": True}]  # one order instead of hundreds
            else:
                orders = [{"rid": work.rid} for work in aborted]
            for start in range(0, len(orders), 32):
                batch = [self._api.post("/abort_request", order) for order in orders[start : start + 32]]
                for outcome in await asyncio.gather(*batch, return_exceptions=True):
                    if isinstance(outcome, Unreachable) and outcome.refused:
                        return self._die(outcome)
            await asyncio.sleep(self._times.abort_every)

    # ---- life and death

    async def _watch(self) -> None:
        while self._under_way:
            await asyncio.sleep(self._times.probe_every)
            try:
                await self._api.get(SIGN_OF_LIFE, self._times.probe_timeout)
                self._sign = time.monotonic()
            except (Unreachable, Refused) as error:
                silent = time.monotonic() - self._sign
                if isinstance(error, Unreachable) and error.refused:
                    self._die(error)
                elif silent > self._times.dead_after:
                    self._die(EngineDied(f"{error}; no sign of life for {silent:.0f} s"))

    def die(self, error: EngineDied) -> None:
        """From another thread. When it returns, all that was under way has been told."""

        async def die() -> None:
            self._die(error)

        self._api.call(die())

    def _die(self, error: EngineDied) -> None:
        """Told once."""
        if self.death:
            return
        self.death = EngineDied(f"the SGLang server at {self._api.url} is gone: {error}")
        works, current = list(self._under_way.values()), asyncio.current_task()
        self._under_way.clear()
        for work in works:
            if work.task and work.task is not current:
                work.task.cancel()
        death = self.death
        self._tell(lambda listener: listener.died(death))

    def _keep_doing(self, name: str, what: Callable[[], Awaitable[None]]) -> None:
        """One such task at a time."""
        if name not in self._tasks or self._tasks[name].done():

            async def run() -> None:
                await what()

            self._tasks[name] = asyncio.create_task(run())

    def _report(self, report: TokenChunk) -> None:
        self._tell(lambda listener: listener.received([report]))

    def _tell(self, message: Callable[[Listener], None]) -> None:
        if self.listener is not None:
            message(self.listener)
