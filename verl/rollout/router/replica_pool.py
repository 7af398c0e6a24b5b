"""The members of a router: which are used, which are dead, and how a dead one comes back.

      ┌──────────────── given the saved weights, or those of the next update ────────────────┐
      v                                                                                      │
    used ──(EngineDied)──> dead ──(revive() builds its engine anew, in a thread)──> unsynced ┘
                            │
                            └──(refused, or died more often than it may)──> dead for good

An unsynced member takes no requests: its weights are whatever its engine started with. Where weights are saved, it gets
the last ones at once, unless the others sleep; where they come as a stream, it waits for the next.

Without a bound on revivals, members are servers that somebody else starts: they are asked for now and then, and nobody
waits for them. With one, they are ours, on devices that are ours too: they are started again at once, are waited for
where none is used, and an unsynced one sleeps and wakes with the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, WeightStream
from verl.rollout.contract.base import MemoryTag, RolloutEngine
from verl.rollout.router.concurrent import asyncio_run

State = Literal["used", "dead", "unsynced"]


@dataclass(eq=False)
class Replica:
    """One engine of several. tokens: of its requests in flight, prompt and longest response. death: what it died of.
    refusal: why it cannot be brought back, as far as it has been said. attempts: at bringing it back, in all.
    reviver: the thread that makes them, while it is dead."""

    name: str
    engine: RolloutEngine
    state: State = "used"
    tokens: int = 0
    death: str = ""
    refusal: str = ""
    attempts: int = 0
    reviver: threading.Thread | None = None


LOOK_EVERY = 0.1  # seconds

Engines = dict[RolloutEngine, Replica]
Answers = dict[Replica, Any]


class ReplicaPool:
    """paused, asleep, saved: what a member that comes back is brought to; saved: the stream, which can be read many
    times, and its version.

    lock: of all that is here, held for moments only. syncing: held while members get weights, sleep or wake; taken
    before ``lock``. news: done as soon as anything here has changed.
    """

    def __init__(
        self,
        members: Sequence[Replica],
        *,
        revive: Callable[[str], RolloutEngine] | None,
        revivals: int | None,
        retry_every: float,
        note: Callable[[str], None],
    ):
        self.members, self.retry_every = list(members), retry_every
        self._revive, self._revivals, self._note = revive, revivals, note
        self._ours = revivals is not None
        self.lock, self.syncing = threading.RLock(), threading.Lock()
        self.paused = False
        self.asleep: set[MemoryTag] = set()
        self.saved: tuple[WeightStream, int] | None = None
        self.news = _promise()
        self._gate = threading.Condition()
        self._building = self._held = self._wanted = 0  # members being built, reasons not to, orders that wait for one
        self._stopping = threading.Event()

    # ---- which there are

    @property
    def obeying(self) -> tuple[State, ...]:
        """The states in which a member sleeps and wakes when it is told to."""
        return ("used", "unsynced") if self._ours else ("used",)

    def find(self, *states: State) -> Engines:
        """Members in these states. There may be none as long as one may still come back; after that it raises
        EngineDied, naming all."""
        with self.lock:
            found = {member.engine: member for member in self.members if member.state in states}
            if not found and not self._awaited():
                raise self.none_left()
            return found

    def wait_for(self, *states: State) -> None:
        """Blocks until ``find`` finds one, or raises. Not to be called with a lock held."""
        while True:
            news = self.news  # before the look: it is done by whatever changes after that
            if self.find(*states):
                return
            with self._gate:
                self._wanted += 1
            try:
                news.result()
            finally:
                with self._gate:
                    self._wanted -= 1

    def none_left(self) -> EngineDied:
        return EngineDied("no rollout engine is left:\n" + "\n".join(f"  {_fate(member)}" for member in self.members))

    def _awaited(self) -> bool:
        return self._ours and not self._stopping.is_set() and any(member.reviver for member in self.members)

    def changed(self) -> None:
        with self.lock:
            news, self.news = self.news, _promise()
            news.set_result(None)

    # ---- death and return

    def lost(self, member: Replica, engine: RolloutEngine, error: EngineDied) -> None:
        """Take it out, unless this was noticed before."""
        with self.lock:
            if member.engine is not engine or member.state == "dead":
                return
            member.state, member.death, member.refusal = "dead", str(error), ""
            left = sum(other.state == "used" for other in self.members)
            rest = f"; its unfinished requests are drawn again by the {left} left" if left else ""
            self._note(f"rollout: {member.name} is taken out{rest}: {error}")
            if self._revive and member.reviver is None and not self._stopping.is_set():
                member.reviver = threading.Thread(
                    target=self._bring_back, args=(member, self._revive), name="rollout reviver", daemon=True
                )
                member.reviver.start()

    def settle(self, engines: Engines, outcomes: Sequence[Any]) -> Answers:
        """What those answered that did not die of the order; the dead are taken out. Raises what another raised, and
        EngineDied when none is left and none may come back."""
        answers, errors = {}, []
        for (engine, member), outcome in zip(engines.items(), outcomes, strict=True):
            if isinstance(outcome, EngineDied):
                self.lost(member, engine, outcome)
            elif isinstance(outcome, BaseException):
                errors.append(outcome)
            else:
                answers[member] = outcome
        if errors:
            raise errors[0]
        if not answers and engines:
            self.find("used")
        return answers

    def _bring_back(self, member: Replica, revive: Callable[[str], RolloutEngine]) -> None:
        pause = 0.0 if self._ours else self.retry_every
        while self._goes_on(member) and not self._stopping.wait(pause):
            pause = self.retry_every
            with self._turn() as mine:
                if not mine:
                    continue
                member.attempts += 1
                try:
                    self._try(member, revive)
                except Exception as error:  # the end of this thread would be the end of all attempts
                    self._failed(member, f"{type(error).__name__}: {error}")

    @contextmanager
    def _turn(self) -> Iterator[bool]:
        """Ours are built while the others are awake, which is when the trainer leaves the devices to them; or whenever
        somebody waits for one. False where nothing is to be built any more."""
        with self._gate:
            while self._ours and not self._wanted and (self._held or self.asleep):
                if self._stopping.is_set():
                    break
                self._gate.wait(LOOK_EVERY)
            self._building += 1
        try:
            yield not self._stopping.is_set()
        finally:
            with self._gate:
                self._building -= 1
                self._gate.notify_all()

    @contextmanager
    def none_built(self) -> Iterator[None]:
        """Within this ours are not built, unless somebody waits for one: those under way are waited for."""
        with self._gate:
            self._held += 1
            while self._ours and self._building and not self._stopping.is_set():
                self._gate.wait(LOOK_EVERY)
        try:
            yield
        finally:
            with self._gate:
                self._held -= 1
                self._gate.notify_all()

    def _goes_on(self, member: Replica) -> bool:
        """Whether it is to be tried (again); if not, this is the end of its reviver."""
        with self.lock:
            if member.state == "dead":
                if self._revivals is None or (not member.refusal and member.attempts < self._revivals):
                    return True
                if not member.refusal:
                    times = f"{member.attempts} time{'s' if member.attempts != 1 else ''}"
                    self._note(
                        f"rollout: {member.name} was restarted {times} and is not restarted again: {member.death}"
                    )
            member.reviver = None
            self.changed()
            return False

    def _try(self, member: Replica, revive: Callable[[str], RolloutEngine]) -> None:
        with contextlib.suppress(UserError):
            asyncio.run(member.engine.close())  # what is left of it may be where the next is to be
        try:
            fresh = revive(member.name)
        except EngineDied as error:
            if self._ours:  # a server just is not there yet
                self._failed(member, str(error))
        except UserError as error:  # it answers, but not as it should: said once
            if str(error) != member.refusal:
                member.refusal = str(error)
                self._note(f"rollout: {member.name} cannot be brought back: {error}")
        else:
            with self.syncing:
                self._welcome(member, fresh)

    def _failed(self, member: Replica, why: str) -> None:
        self._note(f"rollout: {member.name} could not be brought back: {why}")
        if self._ours:
            member.death = why

    def _welcome(self, member: Replica, fresh: RolloutEngine) -> None:
        """It is awake, and its weights are not the current ones."""
        with self.lock:
            member.engine, member.state = fresh, "unsynced"
            self.changed()
        if self._stopping.is_set():
            return
        try:
            if self.asleep and self._ours:
                asyncio.run(fresh.sleep(sorted(self.asleep)))
            sleeps = self._ours and "kv_cache" in fresh.capabilities.sleep
            if (
                self.saved is None
                or "weights" in self.asleep
                or (self.asleep and not sleeps)
                or (sleeps and self.any_used())
            ):
                self._note(f"rollout: {member.name} is back; it is used after the next weight update")
            else:
                self.catch_up([member], ["kv_cache"] if sleeps and not self.asleep else [])
        except EngineDied as error:
            self.lost(member, fresh, error)
        except UserError as error:
            member.refusal = str(error)
            self._note(f"rollout: {member.name} is back, but could not be given weights: {error}")

    def any_used(self) -> bool:
        return any(member.state == "used" for member in self.members)

    def catch_up(self, members: Iterable[Replica], cache: Sequence[MemoryTag] = ()) -> None:
        """Give the saved weights, if there are any, to those that are unsynced. Raises what an engine refuses. cache:
        that is not to be there meanwhile, as the trainer's model is loaded to send them."""
        for member in members:
            if member.state == "unsynced" and self.saved:
                stream, version = self.saved
                try:
                    if cache:
                        asyncio_run(member.engine.sleep(cache))
                    asyncio_run(member.engine.update_weights(stream, version))
                    if cache:
                        asyncio_run(member.engine.wake(cache))
                except EngineDied as error:
                    self.lost(member, member.engine, error)
                else:
                    self.join(member)
                if member.state == "used":
                    self._note(f"rollout: {member.name} is back, and has the weights of version {version}")

    def join(self, member: Replica) -> None:
        """It has the current weights: bring it into the state of the others, and use it."""
        engine, paused = member.engine, False
        try:
            while True:
                with self.lock:
                    if self.paused == paused:
                        member.state = "used"
                        self.changed()
                        break
                    paused = self.paused
                asyncio_run(engine.pause() if paused else engine.resume())
            if self.asleep and not self._ours:  # ours slept on arrival
                asyncio_run(engine.sleep(sorted(self.asleep)))
        except EngineDied as error:
            self.lost(member, engine, error)

    def stop(self) -> None:
        """Nobody is brought back from now on, and nobody waited for."""
        with self.lock:
            self._stopping.set()
            self.changed()
            revivers = [member.reviver for member in self.members if member.reviver]
        for reviver in revivers:
            reviver.join()


def _fate(member: Replica) -> str:
    fate = "is back, but has not been given weights yet" if member.state == "unsynced" else member.death
    return f"{member.name}: {fate}" + (f"; it cannot be used: {member.refusal}" if member.refusal else "")


def _promise() -> Future[None]:
    """One that those who wait for it cannot cancel: it is for all of them."""
    future: Future[None] = Future()
    future.set_running_or_notify_cancel()
    return future
