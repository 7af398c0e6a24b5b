"""Several rollout engines as one: requests are spread over them, and a dead one's are drawn again by the others.

                        ┌────────────── revived and given the current weights ─────────────┐
                        v                                                                  │
    used ──(EngineDied)──> dead ──(revive() builds it anew)──> unsynced ──(update_weights)──┘

An unsynced member takes no requests: its weights are whatever its server started with. Where weights are saved to a
folder, it gets the last ones at once; where they come as a stream, it waits for the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from verl.errors import UserError
from verl.rollout.backend import EngineDied, WeightStream
from verl.rollout.base import Capabilities, IllegalState, MemoryTag, Request, Result, RolloutEngine
from verl.rollout.fan import Fan
from verl.rollout.requests import check_ids

RETRY_EVERY = 10.0  # seconds between attempts at a dead member
# A prompt's requests stay together as long as their member has at most this many of them more than the idlest.
KEEP_TOGETHER = 8
CHECKED = -1  # stands for the version of weights that are saved to be compared


@dataclass(eq=False)
class Member:
    """One engine of several. tokens: of its requests in flight, prompt and longest response. death: what it died of.
    refusal: why it cannot be brought back, as far as it has been said."""

    name: str
    engine: RolloutEngine
    state: Literal["used", "dead", "unsynced"] = "used"
    tokens: int = 0
    death: str = ""
    refusal: str = ""


@dataclass(eq=False)
class _Flight:
    """A request under way. prompt: hashable. member: that draws it now."""

    request: Request
    prompt: bytes
    tokens: int
    aborted: bool = False
    member: Member | None = None


@dataclass
class _Home:
    """Where a prompt's requests go, while there are any."""

    member: Member
    flights: int = 0


class Router:
    """See ``verl.rollout.base.RolloutEngine``.

    revive: builds a fresh engine for the member of this name; raises EngineDied while there is none, and another
        UserError where what is there cannot be used.
    save: stores a stream and returns it as one that can be read many times; None: members share the one stream.
    forget: called with what ``save`` returned once newer weights are everywhere. note: takes what the user should know.
    """

    def __init__(
        self,
        members: Sequence[Member],
        *,
        revive: Callable[[str], RolloutEngine] | None = None,
        save: Callable[[WeightStream, int], WeightStream] | None = None,
        forget: Callable[[WeightStream], None] = lambda saved: None,
        note: Callable[[str], None] = lambda text: None,
        retry_every: float = RETRY_EVERY,
    ):
        if not members:
            raise ValueError("a router needs at least one member")
        self.members = list(members)
        self.capabilities = _common([member.engine.capabilities for member in members])
        self._revive, self._save, self._forget, self._note = revive, save, forget, note
        self._retry_every = retry_every
        self._lock = threading.RLock()  # of all that follows; held for moments only
        self._flights: dict[str, _Flight] = {}
        self._homes: dict[bytes, _Home] = {}
        self._saved: tuple[WeightStream, int] | None = None
        self._asleep: set[MemoryTag] = set()
        self._paused = self._closed = False
        self._reviver: threading.Thread | None = None
        self._closing = threading.Event()
        self._syncing = threading.Lock()  # held while members get weights

    # ---- requests

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        with self._lock:
            self._check_open("generate")
            ids = [request.id for request in requests]
            check_ids(ids, self._flights)
            flights = {request.id: _flight(request) for request in requests}
            self._flights.update(flights)
        tasks = [asyncio.create_task(self._draw(flight)) for flight in flights.values()]
        try:
            return await asyncio.gather(*tasks)
        finally:  # one that cannot be served ends the others of its call
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            with self._lock:
                for id in flights:
                    del self._flights[id]

    async def _draw(self, flight: _Flight) -> Result:
        while not flight.aborted:
            member, engine = self._board(flight)
            try:
                return (await engine.generate([flight.request]))[0]
            except EngineDied as error:
                self._lost(member, engine, error)
            finally:
                self._leave(flight)
        return Result(flight.request.id, [], [], "abort")

    def _board(self, flight: _Flight) -> tuple[Member, RolloutEngine]:
        """Give the request to its prompt's member, or to the one with the fewest tokens in flight."""
        with self._lock:
            used = self._used()
            idlest = min(used, key=lambda member: member.tokens)
            home = self._homes.setdefault(flight.prompt, _Home(idlest))
            if home.member.state != "used":
                home.member = idlest
            ahead = home.member.tokens - idlest.tokens
            member = home.member if ahead <= KEEP_TOGETHER * flight.tokens else idlest
            home.flights += 1
            member.tokens += flight.tokens
            flight.member = member
            return member, member.engine

    def _leave(self, flight: _Flight) -> None:
        with self._lock:
            assert flight.member is not None
            flight.member.tokens -= flight.tokens
            flight.member = None
            home = self._homes[flight.prompt]
            home.flights -= 1
            if not home.flights:
                del self._homes[flight.prompt]

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        with self._lock:
            chosen = [self._flights[id] for id in (self._flights if ids is None else ids) if id in self._flights]
            for flight in chosen:
                flight.aborted = True
            engines = {flight.member.engine: flight.member for flight in chosen if flight.member}
        names = [flight.request.id for flight in chosen]
        await self._tell(engines, lambda engine: engine.abort(names))

    async def pause(self) -> None:
        with self._lock:
            self._check_open("pause")
            if self._paused:
                raise IllegalState("pause: the engine is already paused")
            self._paused = True
            engines = self._engines()
        await self._tell(engines, lambda engine: engine.pause())

    async def resume(self) -> None:
        with self._lock:
            self._check_open("resume")
            if not self._paused:
                raise IllegalState("resume: the engine is not paused")
            self._paused = False
            engines = self._engines()
        try:
            await self._tell(engines, lambda engine: engine.resume())
        except IllegalState:
            self._paused = True
            raise

    # ---- weights and memory: orders that block, each member's in a thread of its own

    async def update_weights(self, stream: WeightStream, version: int) -> None:
        """Unsynced members take part, and are used from then on."""
        with self._syncing, self._order("update_weights"):
            engines = self._engines("used", "unsynced")
            before = self._saved
            if self._save is not None:
                self._saved = None  # if writing fails, the old ones are nobody's any more
                self._saved = self._save(stream, version), version
            source = self._saved[0] if self._saved else stream
            self._deal(source, engines, lambda engine, weights: engine.update_weights(weights, version))
            for engine, member in engines.items():
                if member.state == "unsynced" and member.engine is engine:
                    try:
                        self._join(member)
                    except EngineDied as error:
                        self._lost(member, engine, error)
            if before:
                self._forget(before[0])

    async def check_weights(self, stream: WeightStream) -> list[str]:
        with self._syncing, self._order("check_weights"):
            engines = self._engines()
            source = stream if self._save is None else self._save(stream, CHECKED)
            found = self._deal(source, engines, lambda engine, weights: engine.check_weights(weights))
            if self._save is not None:
                self._forget(source)
        return [f"{member.name}: {line}" for member, lines in found.items() for line in lines]

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        with self._syncing, self._order("sleep"):
            self._in_threads(self._engines(), lambda engine: engine.sleep(tags))
            self._asleep |= set(tags)

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        with self._syncing, self._order("wake", idle=False):
            self._in_threads(self._engines(), lambda engine: engine.wake(tags))
            self._asleep -= set(tags)

    async def health(self) -> None:
        """Of the members in use: those that do not answer are taken out. Raises when none is left."""
        with self._order("health", idle=False):
            self._in_threads(self._engines(), lambda engine: engine.health())

    async def close(self) -> None:
        if self._closed:
            return
        with contextlib.suppress(EngineDied):
            await self.abort()
        with self._lock:
            self._closed = True
            self._closing.set()
            reviver, engines = self._reviver, {member.engine: member for member in self.members}
        if reviver:
            reviver.join()
        with contextlib.suppress(EngineDied):
            self._in_threads(engines, lambda engine: engine.close())
        if self._saved:
            self._forget(self._saved[0])

    # ---- members

    def _used(self) -> list[Member]:
        """Raises EngineDied naming all when there are none."""
        if used := [member for member in self.members if member.state == "used"]:
            return used
        states = "\n".join(
            f"  {member.name}: "
            + ("is back, but has not been given weights yet" if member.state == "unsynced" else member.death)
            for member in self.members
        )
        raise EngineDied(f"no rollout engine is left:\n{states}")

    def _engines(self, *states: str) -> dict[RolloutEngine, Member]:
        with self._lock:
            wanted = states or ("used",)
            if found := {member.engine: member for member in self.members if member.state in wanted}:
                return found
            self._used()
            raise AssertionError

    def _lost(self, member: Member, engine: RolloutEngine, error: EngineDied) -> None:
        """Take it out, unless this was noticed before."""
        with self._lock:
            if member.engine is not engine or member.state == "dead":
                return
            member.state, member.death = "dead", str(error)
            left = sum(other.state == "used" for other in self.members)
            rest = f"; its unfinished requests are drawn again by the {left} left" if left else ""
            self._note(f"rollout: {member.name} is taken out{rest}: {error}")
            if self._revive and self._reviver is None and not self._closed:
                self._reviver = threading.Thread(target=self._revive_dead, name="rollout reviver", daemon=True)
                self._reviver.start()

    def _revive_dead(self) -> None:
        while not self._closing.wait(self._retry_every):
            for member in [member for member in self.members if member.state == "dead"]:
                try:
                    self._try(member)
                except Exception as error:  # the end of this thread would be the end of all revivals
                    self._note(f"rollout: {member.name} could not be brought back: {type(error).__name__}: {error}")
            with self._lock:
                if not any(member.state == "dead" for member in self.members):
                    self._reviver = None
                    return

    def _try(self, member: Member) -> None:
        assert self._revive is not None
        try:
            fresh = self._revive(member.name)
        except EngineDied:  # not yet
            return
        except UserError as error:  # it answers, but not as it should: said once
            if str(error) != member.refusal:
                member.refusal = str(error)
                self._note(f"rollout: {member.name} cannot be brought back: {error}")
            return
        with self._syncing:
            with self._lock:
                old, member.engine, member.state = member.engine, fresh, "unsynced"
                saved = None if self._asleep else self._saved
            with contextlib.suppress(EngineDied):
                asyncio.run(old.close())
            if saved is None:
                return self._note(f"rollout: {member.name} is back; it is used after the next weight update")
            try:
                asyncio.run(fresh.update_weights(*saved))
                self._join(member)
                self._note(f"rollout: {member.name} is back, and has the weights of version {saved[1]}")
            except EngineDied as error:
                self._lost(member, fresh, error)
            except UserError as error:
                self._note(f"rollout: {member.name} is back, but could not be given weights: {error}")

    def _join(self, member: Member) -> None:
        """It has the current weights: bring it into the state of the others, and use it."""
        paused = False
        while True:
            with self._lock:
                if self._paused == paused:
                    member.state = "used"
                    break
                paused = self._paused
            asyncio_run(member.engine.pause() if paused else member.engine.resume())
        if self._asleep:
            asyncio_run(member.engine.sleep(sorted(self._asleep)))

    # ---- orders to members

    async def _tell(
        self, engines: dict[RolloutEngine, Member], order: Callable[[RolloutEngine], Awaitable[None]]
    ) -> None:
        outcomes = await asyncio.gather(*(order(engine) for engine in engines), return_exceptions=True)
        self._settle(engines, outcomes)

    def _in_threads(
        self, engines: dict[RolloutEngine, Member], order: Callable[[RolloutEngine], Awaitable[Any]]
    ) -> dict[Member, Any]:
        """What each member answered; the dead are taken out. Raises what another raised."""
        with ThreadPoolExecutor(len(engines)) as pool:
            calls = [pool.submit(asyncio_run, order(engine)) for engine in engines]
        outcomes = [call.exception() or call.result() for call in calls]
        return self._settle(engines, outcomes)

    def _deal(
        self,
        stream: WeightStream,
        engines: dict[RolloutEngine, Member],
        order: Callable[[RolloutEngine, WeightStream], Awaitable[Any]],
    ) -> dict[Member, Any]:
        """As _in_threads, for orders that read the stream."""
        if self._save is not None:  # it can be read many times
            return self._in_threads(engines, lambda engine: order(engine, stream))
        fan = Fan(len(engines))

        def read(engine: RolloutEngine, weights: WeightStream) -> Any:
            return asyncio_run(order(engine, weights))

        with ThreadPoolExecutor(len(engines)) as pool:
            calls = [pool.submit(fan.run, index, partial(read, engine)) for index, engine in enumerate(engines)]
            fan.feed(stream)  # here: where it comes from may not like other threads
        outcomes = [call.exception() or call.result() for call in calls]
        return self._settle(engines, outcomes)

    def _settle(self, engines: dict[RolloutEngine, Member], outcomes: Sequence[Any]) -> dict[Member, Any]:
        answers, errors = {}, []
        for (engine, member), outcome in zip(engines.items(), outcomes, strict=True):
            if isinstance(outcome, EngineDied):
                self._lost(member, engine, outcome)
            elif isinstance(outcome, BaseException):
                errors.append(outcome)
            else:
                answers[member] = outcome
        if errors:
            raise errors[0]
        if not answers and engines:
            self._used()
        return answers

    # ---- state

    def _check_open(self, order: str) -> None:
        if self._closed:
            raise IllegalState(f"{order}: the engine is closed")

    @contextmanager
    def _order(self, order: str, idle: bool = True) -> Iterator[None]:
        self._check_open(order)
        if idle and self._flights and not self._paused:
            raise IllegalState(f"{order}: {len(self._flights)} requests are being generated; pause or abort them first")
        yield


def asyncio_run(order: Awaitable[Any]) -> Any:
    """Its result; in a thread that may already run an event loop, from one that does not."""

    async def run() -> Any:
        return await order

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(run())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, run()).result()


def _flight(request: Request) -> _Flight:
    prompt = np.asarray(request.prompt_ids, np.int64).tobytes()
    return _Flight(request, prompt, len(request.prompt_ids) + request.sampling.max_new_tokens)


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
    )
