"""Several rollout engines as one: requests are spread over them, and a dead one's are drawn again by the others, or by
itself once it is back (``verl.rollout.router.replica_pool``).

    generate ──> flights ──board──> the member with the prompt's other requests, or the idlest ──> result
                    ^                                    │
                    └────────── EngineDied ──────────────┘

    weights, sleep, wake, health ──> all members, a thread each; given again to one that is back, where all died of it
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import numpy as np

from verl.rollout.client.backend import EngineDied, WeightStream
from verl.rollout.contract.base import (
    Capabilities,
    IllegalState,
    MemoryTag,
    PromptWindow,
    Request,
    Result,
    RolloutEngine,
)
from verl.rollout.contract.requests import check_ids
from verl.rollout.router.concurrent import deal, in_threads
from verl.rollout.router.replica_pool import Answers, Engines, Replica, ReplicaPool, State
from verl.rollout.weights.fan import OwnFan

Answer = TypeVar("Answer")

RETRY_EVERY = 10.0  # seconds between attempts at a dead member
# A prompt's requests stay together as long as their member has at most this many of them more than the idlest.
KEEP_TOGETHER = 8
CHECKED = -1  # stands for the version of weights that are saved to be compared


@dataclass(eq=False)
class PendingRequest:
    """A request under way. prompt: hashable. member: that draws it now."""

    request: Request
    prompt: bytes
    tokens: int
    aborted: bool = False
    member: Replica | None = None


@dataclass
class PrefixAffinity:
    """Where a prompt's requests go, while there are any."""

    member: Replica
    all_pending: int = 0


class Router:
    """See ``verl.rollout.contract.base.RolloutEngine``.

    revive: builds a fresh engine for the member of this name, whose last one has been closed; called in a thread of the
        member's own. Raises EngineDied where there is none (yet), and another UserError where what is there cannot be
        used.
    revivals: how many times in all one member may be brought back, failed attempts included. As long as one may,
        requests and orders that find no member in use wait for it; a refusal (UserError) is final. None: any number of
        times, and nobody waits.
    save: stores a stream and returns it as one that can be read many times; None: members share the one stream.
    forget: called with what ``save`` returned once newer weights are everywhere. note: takes what the user should know.
    """

    def __init__(
        self,
        members: Sequence[Replica],
        *,
        revive: Callable[[str], RolloutEngine] | None = None,
        revivals: int | None = None,
        save: Callable[[WeightStream, int], WeightStream] | None = None,
        forget: Callable[[WeightStream], None] = lambda saved: None,
        note: Callable[[str], None] = lambda text: None,
        retry_every: float = RETRY_EVERY,
    ):
        if not members:
            raise ValueError("a router needs at least one member")
        self.capabilities = _common([member.engine.capabilities for member in members])
        self._pool = ReplicaPool(members, revive=revive, revivals=revivals, retry_every=retry_every, note=note)
        self.members = self._pool.members
        self._save, self._forget = save, forget
        self._lock = self._pool.lock  # of all that follows, too
        self._pending: dict[str, PendingRequest] = {}
        self._affinities: dict[bytes, PrefixAffinity] = {}
        self._closed = False
        self._busy: str | None = None  # the order that is under way and needs the replicas for itself

    # ---- requests

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        with self._lock:
            self._check("generate")
            if not self._pool.paused:  # while paused, requests queue
                self._check_free("generate")
            ids = [request.id for request in requests]
            check_ids(ids, self._pending)
            all_pending = {request.id: _pending_request(request) for request in requests}
            self._pending.update(all_pending)
        tasks = [asyncio.create_task(self._generate(pending)) for pending in all_pending.values()]
        try:
            return await asyncio.gather(*tasks)
        finally:  # one that cannot be served ends the others of its call
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with self._lock:
                for id in all_pending:
                    del self._pending[id]

    async def _generate(self, pending: PendingRequest) -> Result:
        while True:
            news = self._pool.news  # before any look: it is done by whatever changes after that
            if pending.aborted:
                return Result(pending.request.id, [], [], "abort")
            if (assigned := self._assign(pending)) is None:
                await asyncio.wrap_future(news)
                continue
            member, engine = assigned
            try:
                (result,) = await engine.generate([pending.request])
                taken_out = member.engine is not engine or member.state != "used"
                if pending.aborted or not (taken_out and result.finish_reason == "abort"):
                    return result  # otherwise it was closed as dead, and nobody asked for the request's end
            except EngineDied as error:
                self._pool.lost(member, engine, error)
            finally:
                self._leave(pending)

    def _assign(self, pending: PendingRequest) -> tuple[Replica, RolloutEngine] | None:
        """Give the request to its prompt's member, or to the one with the fewest tokens in flight. None: nobody can
        take it now."""
        with self._lock:
            if pending.aborted or not (used := self._pool.find("used").values()):
                return None
            idlest = min(used, key=lambda member: member.tokens)
            affinity = self._affinities.setdefault(pending.prompt, PrefixAffinity(idlest))
            if affinity.member.state != "used":
                affinity.member = idlest
            ahead = affinity.member.tokens - idlest.tokens
            member = affinity.member if ahead <= KEEP_TOGETHER * pending.tokens else idlest
            affinity.all_pending += 1
            member.tokens += pending.tokens
            pending.member = member
            return member, member.engine

    def _leave(self, pending: PendingRequest) -> None:
        with self._lock:
            assert pending.member is not None
            pending.member.tokens -= pending.tokens
            pending.member = None
            affinity = self._affinities[pending.prompt]
            affinity.all_pending -= 1
            if not affinity.all_pending:
                del self._affinities[pending.prompt]

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        with self._lock:
            chosen = [self._pending[id] for id in (self._pending if ids is None else ids) if id in self._pending]
            for pending in chosen:
                pending.aborted = True
            self._pool.changed()  # for those that wait
            engines = {pending.member.engine: pending.member for pending in chosen if pending.member}
        names = [pending.request.id for pending in chosen]
        await self._tell(engines, lambda engine: engine.abort(names))

    async def pause(self) -> None:
        with self._lock:
            self._check("pause")
            self._check_free("pause")
            if self._pool.paused:
                raise IllegalState("pause: the engine is already paused")
            self._pool.paused = True
            engines = self._pool.find("used")
        await self._tell(engines, lambda engine: engine.pause())

    async def resume(self) -> None:
        with self._lock:
            self._check("resume")
            self._check_free("resume")
            if not self._pool.paused:
                raise IllegalState("resume: the engine is not paused")
            self._pool.paused = False
            engines = self._pool.find("used")
        try:
            await self._tell(engines, lambda engine: engine.resume())
        except IllegalState:
            self._pool.paused = True
            raise

    # ---- weights and memory: orders that block, each member's in a thread of its own

    async def update_weights(self, stream: WeightStream, version: int) -> None:
        """Sends the weights to all replicas, and returns once one of them holds these weights. Replicas with stale
        weights are used from then on. Runs in a thread: other coroutines of the event loop advance meanwhile."""
        await self._in_thread("update_weights", partial(self._update_weights, stream, version))

    def _update_weights(self, stream: WeightStream, version: int) -> None:
        before, stored = self._pool.saved, cache(lambda: self._stored(stream, version))

        def give(engines: Engines) -> Answers:
            taken = self._deal(stored(), engines, lambda engine, weights: engine.update_weights(weights, version))
            for member in taken:
                if member.state == "unsynced":
                    self._pool.join(member)
            return {member: None for member in taken if member.state == "used"}

        self._until_answered("update_weights", give, "used", "unsynced", twice=self._save is not None)
        if before:
            self._forget(before[0])

    @property
    def update_seconds(self) -> Mapping[str, float]:
        """Of the member for which they are most."""
        with self._lock:
            found = [member.engine.update_seconds for member in self.members if member.state == "used"]
        return max(found, key=lambda seconds: sum(seconds.values()), default={})

    def _stored(self, stream: WeightStream, version: int) -> WeightStream:
        if self._save is None:
            return stream
        self._pool.saved = None  # if writing fails, the old ones are nobody's any more
        stream = self._save(stream, version)
        self._pool.saved = stream, version
        return stream

    async def check_weights(self, stream: WeightStream) -> list[str]:
        """Replicas that were restarted while the others slept get their weights now, at the latest."""
        return await self._in_thread("check_weights", partial(self._check_weights, stream))

    def _check_weights(self, stream: WeightStream) -> list[str]:
        stored = cache(lambda: stream if self._save is None else self._save(stream, CHECKED))

        def compare(engines: Engines) -> Answers:
            self._pool.catch_up(engines.values())
            used = {engine: member for engine, member in engines.items() if member.state == "used"}
            return self._deal(stored(), used, lambda engine, weights: engine.check_weights(weights))

        states = self._pool.obeying if self._pool.saved else ("used",)
        found = self._until_answered("check_weights", compare, *states, twice=self._save is not None)
        if self._save is not None:
            self._forget(stored())
        return [f"{member.name}: {line}" for member, lines in found.items() for line in lines]

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        def order(engines: Engines) -> Answers:
            if answers := self._in_threads(engines, lambda engine: engine.sleep(tags)):
                self._pool.asleep |= set(tags)
            return answers

        def sleep() -> None:
            with self._pool.none_built():  # a replica that is being restarted has to sleep, too
                self._until_answered("sleep", order, *self._pool.obeying)

        await self._in_thread("sleep", sleep)

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        """One that came back while it was the only one gets the saved weights as soon as nothing sleeps."""

        def order(engines: Engines) -> Answers:
            if answers := self._in_threads(engines, lambda engine: engine.wake(tags)):
                self._pool.asleep -= set(tags)
                if not self._pool.asleep and not self._pool.any_used():
                    self._pool.catch_up(answers)
            return answers

        def wake() -> None:
            self._until_answered("wake", order, *self._pool.obeying, idle=False)

        await self._in_thread("wake", wake, idle=False)

    async def health(self) -> None:
        """Those that do not answer are taken out. Raises when none is left."""

        def order(engines: Engines) -> Answers:
            return self._in_threads(engines, lambda engine: engine.health())

        def health() -> None:
            self._until_answered("health", order, *self._pool.obeying, idle=False)

        await asyncio.to_thread(health)

    async def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        with contextlib.suppress(EngineDied):
            await self.abort()
        self._pool.stop()
        with contextlib.suppress(EngineDied):
            self._in_threads({member.engine: member for member in self.members}, lambda engine: engine.close())
        if self._pool.saved:
            self._forget(self._pool.saved[0])

    # ---- orders to members

    async def _in_thread(self, name: str, work: Callable[[], Answer], idle: bool = True) -> Answer:
        """``work()`` in a thread. Until it returns, other orders that need the replicas for themselves raise
        IllegalState."""
        with self._lock:
            self._check(name, idle)
            self._check_free(name)
            self._busy = name

        def run() -> Answer:
            try:
                return work()
            finally:
                self._busy = None

        return await asyncio.to_thread(run)

    def _check_free(self, order: str) -> None:
        if self._busy:
            raise IllegalState(f"{order}: {self._busy} is under way; wait until it has returned")

    def _until_answered(
        self,
        name: str,
        order: Callable[[Engines], Answers],
        *states: State,
        idle: bool = True,
        twice: bool = True,
    ) -> Answers:
        """Give the order to the members in these states; where all die of it, or were dead, to those that come back.

        twice: whether it can be given again. idle: whether it needs idle or paused members."""
        while True:
            self._check(name, idle)
            self._pool.wait_for(*states)
            with self._pool.syncing:
                engines = self._pool.find(*states)
                if engines and (answers := order(engines)):
                    return answers
            if engines and not twice:
                raise self._pool.none_left()

    async def _tell(self, engines: Engines, order: Callable[[RolloutEngine], Awaitable[None]]) -> None:
        outcomes = await asyncio.gather(*(order(engine) for engine in engines), return_exceptions=True)
        self._pool.settle(engines, outcomes)

    def _in_threads(self, engines: Engines, order: Callable[[RolloutEngine], Awaitable[Any]]) -> Answers:
        return self._pool.settle(engines, in_threads(engines, order))

    def _deal(
        self, stream: WeightStream, engines: Engines, order: Callable[[RolloutEngine, WeightStream], Awaitable[Any]]
    ) -> Answers:
        if self._save is not None and not isinstance(stream, OwnFan):  # it can be read many times
            return self._in_threads(engines, lambda engine: order(engine, stream))
        return self._pool.settle(engines, deal(stream, engines, order))

    def _check(self, order: str, idle: bool = False) -> None:
        """Raises IllegalState. idle: whether the order needs that."""
        if self._closed:
            raise IllegalState(f"{order}: the engine is closed")
        if idle and self._pending and not self._pool.paused:
            raise IllegalState(f"{order}: {len(self._pending)} requests are being generated; pause or abort them first")


def _pending_request(request: Request) -> PendingRequest:
    prompt = np.asarray(request.prompt_ids, np.int64).tobytes()
    return PendingRequest(request, prompt, len(request.prompt_ids) + request.sampling.max_new_tokens)


def _common(all_of: Sequence[Capabilities]) -> Capabilities:
    """What every one of them can do."""
    return Capabilities(
        sleep=frozenset.intersection(*(each.sleep for each in all_of)),
        own_process=all(each.own_process for each in all_of),
        holds_weights=any(each.holds_weights for each in all_of),
        images=all(each.images for each in all_of),
        stop_strings=all(each.stop_strings for each in all_of),
        min_new_tokens=all(each.min_new_tokens for each in all_of),
        seeded=all(each.seeded for each in all_of),
        window=_sum([each.window for each in all_of]),
    )


def _sum(windows: Sequence[PromptWindow | None]) -> PromptWindow | None:
    """Prompts are spread over all of them."""
    known = [window for window in windows if window is not None]
    if len(known) < len(windows):
        return None
    return PromptWindow(sum(each.tokens for each in known), sum(each.prompts for each in known))
