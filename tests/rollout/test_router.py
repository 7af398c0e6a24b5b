"""Several engines as one: balance, prompts kept together, deaths, and revival. The engines here are scripted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied
from verl.rollout.contract.base import (
    Capabilities,
    IllegalState,
    MemoryTag,
    PromptWindow,
    Request,
    Result,
    SamplingParams,
)
from verl.rollout.contract.states import EngineState
from verl.rollout.router.router import KEEP_TOGETHER, Replica, Router

pytestmark = pytest.mark.timeout(120)  # of a deadlock


class Scripted:
    """Answers a request after ``turns`` of the event loop, and dies when it has answered ``dies_after`` of them.

    Every response is one token: the engine's number. reads: how long it takes over each tensor of an update.
    """

    def __init__(self, number: int, *, turns: int = 1, dies_after: int | None = None, reads: float = 0.0, sleeps=()):
        self.number, self.turns, self.dies_after, self.reads = number, turns, dies_after, reads
        self.capabilities = Capabilities(sleep=frozenset(sleeps), own_process=True, seeded=number % 2 == 0)
        self.version = 0
        self.served: list[str] = []
        self.open: dict[str, Request] = {}
        self.most_open = 0
        self.aborted: set[str] = set()
        self.orders: list[str] = []
        self.weights: dict[str, float] = {}
        self.paused = self.dead = False
        self.update_error: Exception | None = None
        self.update_seconds = {"gather": float(number), "wait": 1.0}

    def check(self) -> None:
        if self.dead:
            raise EngineDied(f"engine {self.number} is gone")

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        return [await self.one(request) for request in requests]

    async def one(self, request: Request) -> Result:
        self.check()
        if len(request.prompt_ids) == 0:
            raise UserError(f"request {request.id!r}: the prompt is empty")
        self.open[request.id] = request
        self.most_open = max(self.most_open, len(self.open))
        try:
            left = self.turns
            while left or self.paused:
                await asyncio.sleep(0)
                self.check()
                if request.id in self.aborted:
                    return Result(request.id, [], [], "abort")
                left -= not self.paused
            if self.dies_after is not None and len(self.served) >= self.dies_after:
                self.dead = True
            self.check()
            self.served.append(request.id)
            return Result(request.id, [self.number], [-1.0], "stop", [(self.version, 0)])
        finally:
            del self.open[request.id]

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        self.aborted |= set(self.open if ids is None else ids)

    async def pause(self) -> None:
        self.check()
        self.orders.append("pause")
        self.paused = True

    async def resume(self) -> None:
        self.check()
        self.orders.append("resume")
        self.paused = False

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.check()
        if self.update_error:
            raise self.update_error
        for name, tensor in stream:
            time.sleep(self.reads)
            self.weights[name] = float(tensor)
        self.check()
        self.version = version

    async def check_weights(self, stream: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        return [f"{name} differs" for name, tensor in stream if self.weights.get(name) != float(tensor)]

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self.check()
        self.orders.append(f"sleep {' '.join(tags)}")

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        self.check()
        self.orders.append(f"wake {' '.join(tags)}")

    async def health(self) -> None:
        self.check()

    async def close(self) -> None:
        self.orders.append("close")


def route(engines: Sequence[Scripted], **options) -> Router:
    return Router([Replica(f"engine {engine.number}", engine) for engine in engines], **options)


def request(id: int | str, prompt: Sequence[int] = (5,), tokens: int = 9) -> Request:
    return Request(str(id), prompt, SamplingParams(max_new_tokens=tokens))


def generate(router: Router, requests: list[Request]) -> list[Result]:
    return asyncio.run(router.generate(requests))


def weights(value: float, count: int = 6) -> Iterable[tuple[str, torch.Tensor]]:
    return ((f"w{index}", torch.tensor(value + index)) for index in range(count))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.005)


# --- requests --------------------------------------------------------------------------------------------------------


@given(
    prompts=st.lists(st.integers(0, 5), max_size=40),
    deaths=st.lists(st.none() | st.integers(0, 12), min_size=1, max_size=4),
    turns=st.lists(st.integers(1, 5), min_size=5, max_size=5),
    calls=st.integers(1, 4),
)
def test_every_request_is_answered_once_as_long_as_one_engine_lives(prompts, deaths, turns, calls):
    engines = [Scripted(number, turns=turns[number], dies_after=deaths[number]) for number in range(len(deaths))] + [
        Scripted(len(deaths), turns=turns[-1])
    ]
    router = route(engines)
    asked = [request(index, prompt=[prompt]) for index, prompt in enumerate(prompts)]

    async def run() -> list[list[Result]]:
        return await asyncio.gather(*(router.generate(asked[first::calls]) for first in range(calls)))

    answered = asyncio.run(run())
    assert [result.id for results in answered for result in results] == [
        asked_for.id for first in range(calls) for asked_for in asked[first::calls]
    ]
    served = Counter(id for engine in engines for id in engine.served)
    assert served == Counter(asked_for.id for asked_for in asked)  # what was finished before a death is kept
    assert all(member.tokens == 0 for member in router.members)
    assert not router._affinities
    assert not router._pending


def test_engines_share_the_work_by_tokens_in_flight():
    engines = [Scripted(0, turns=3), Scripted(1, turns=3), Scripted(2, turns=3)]
    asked = [request("long", prompt=[1], tokens=299)] + [request(index, prompt=[2, index]) for index in range(100)]
    generate(route(engines), asked)
    with_long = next(engine for engine in engines if "long" in engine.served)
    others = [engine for engine in engines if engine is not with_long]
    assert [len(engine.served) for engine in others] == pytest.approx([42, 42], abs=3)


def test_requests_of_a_prompt_go_to_the_same_engine_where_load_allows():
    engines = [Scripted(0, turns=3), Scripted(1, turns=3)]
    asked = [request(f"{prompt} {sample}", prompt=[prompt]) for prompt in range(40) for sample in range(4)]
    results = generate(route(engines), asked)
    where = {prompt: {results[4 * prompt + sample].response_ids[0] for sample in range(4)} for prompt in range(40)}
    assert all(len(engines) == 1 for engines in where.values())
    assert [len(engine.served) for engine in engines] == pytest.approx([80, 80], abs=KEEP_TOGETHER)


def test_one_prompts_many_requests_are_spread_all_the_same():
    engines = [Scripted(0, turns=3), Scripted(1, turns=3)]
    generate(route(engines), [request(index) for index in range(100)])
    assert min(len(engine.served) for engine in engines) >= (100 - KEEP_TOGETHER) // 2 - 1


def test_when_none_is_left_the_error_names_all_and_what_they_died_of():
    router = route([Scripted(0, dies_after=0), Scripted(1, dies_after=0)])
    with pytest.raises(EngineDied) as caught:
        generate(router, [request(index) for index in range(5)])
    assert "engine 0 is gone" in str(caught.value)
    assert "engine 1 is gone" in str(caught.value)


def test_the_user_is_told_of_a_death_once():
    notes: list[str] = []
    generate(route([Scripted(0, dies_after=0), Scripted(1)], note=notes.append), [request(i) for i in range(20)])
    (note,) = notes
    assert "engine 0 is gone" in note
    assert "drawn again by the 1 left" in note


def test_a_request_that_cannot_be_served_ends_its_call_and_no_other():
    engine = Scripted(0, turns=5)
    router = route([engine])

    async def run() -> list[Result]:
        other = asyncio.create_task(router.generate([request("other")]))
        with pytest.raises(UserError, match="'wrong'"):
            await router.generate([request("fine"), request("wrong", prompt=[])])
        return await other

    assert [result.id for result in asyncio.run(run())] == ["other"]
    assert engine.served == ["other"]
    assert len(generate(router, [request("fine")])) == 1


def test_an_id_in_flight_is_refused_whichever_engine_has_it():
    router = route([Scripted(0, turns=5), Scripted(1, turns=5)])

    async def run() -> None:
        call = asyncio.create_task(router.generate([request("same", prompt=[1])]))
        await asyncio.sleep(0)
        with pytest.raises(IllegalState, match="'same'"):
            await router.generate([request("other", prompt=[2]), request("same", prompt=[3])])
        await call

    asyncio.run(run())


def test_abort_reaches_requests_wherever_they_are():
    engines = [Scripted(0, turns=50), Scripted(1, turns=50)]
    router = route(engines)

    async def run(ids: list[str] | None) -> list[Result]:
        call = asyncio.create_task(router.generate([request(index, prompt=[index]) for index in range(6)]))
        for _ in range(3):
            await asyncio.sleep(0)
        await router.abort(ids)
        return await call

    assert [result.finish_reason for result in asyncio.run(run(["1", "4", "nobody"]))] == [
        "abort" if index in (1, 4) else "stop" for index in range(6)
    ]
    for engine in engines:
        engine.aborted.clear()
    assert {result.finish_reason for result in asyncio.run(run(None))} == {"abort"}


def test_a_death_while_paused_moves_requests_to_engines_that_wait_too():
    engines = [Scripted(0, turns=3), Scripted(1, turns=3)]
    router = route(engines)

    async def run() -> list[Result]:
        call = asyncio.create_task(router.generate([request(index, prompt=[index]) for index in range(6)]))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await router.pause()
        engines[0].dead = True
        for _ in range(10):
            await asyncio.sleep(0)
        assert not engines[1].served
        await router.resume()
        return await call

    assert {result.response_ids[0] for result in asyncio.run(run())} == {1}


# --- weights ---------------------------------------------------------------------------------------------------------


def test_all_engines_get_all_weights_of_a_stream_that_is_read_once():
    engines = [Scripted(0), Scripted(1, reads=0.01), Scripted(2)]
    router = route(engines)
    asyncio.run(router.update_weights(weights(3.0), version=4))
    assert all(engine.weights == {f"w{index}": 3.0 + index for index in range(6)} for engine in engines)
    assert all(engine.version == 4 for engine in engines)
    assert asyncio.run(router.check_weights(weights(3.0))) == []
    engines[1].weights["w2"] = 0.0
    assert asyncio.run(router.check_weights(weights(3.0))) == ["engine 1: w2 differs"]


def test_no_more_than_a_few_tensors_are_held_for_a_slow_engine():
    lock = threading.Lock()

    class Counted:
        held = most = 0

        def __init__(self):
            with lock:
                Counted.held += 1
                Counted.most = max(Counted.most, Counted.held)

        def __float__(self):
            return 1.0

        def __del__(self):
            with lock:
                Counted.held -= 1

    router = route([Scripted(0), Scripted(1, reads=0.002)])
    asyncio.run(router.update_weights(((f"w{index}", Counted()) for index in range(60)), version=1))
    assert Counted.most <= 8


def test_an_engine_that_dies_during_an_update_does_not_hold_up_the_others():
    engines = [Scripted(0), Scripted(1, reads=0.005)]
    engines[0].update_error = EngineDied("engine 0 is gone")
    router = route(engines)
    asyncio.run(router.update_weights(weights(1.0, count=20), version=1))
    assert [member.state for member in router.members] == ["dead", "used"]
    assert {result.response_ids[0] for result in generate(router, [request(index) for index in range(4)])} == {1}


def test_weights_that_an_engine_refuses_are_an_error():
    engines = [Scripted(0), Scripted(1)]
    engines[1].update_error = UserError("no such tensor: w3")
    with pytest.raises(UserError, match="no such tensor: w3"):
        asyncio.run(route(engines).update_weights(weights(1.0), version=1))


def test_a_stream_that_breaks_off_is_an_error_for_all():
    def broken() -> Iterable[tuple[str, torch.Tensor]]:
        yield "w0", torch.tensor(1.0)
        raise ValueError("a shard is missing")

    engines = [Scripted(0), Scripted(1)]
    with pytest.raises(ValueError, match="a shard is missing"):
        asyncio.run(route(engines).update_weights(broken(), version=1))
    assert [engine.version for engine in engines] == [0, 0]


def test_weights_are_not_updated_while_requests_are_generated():
    router = route([Scripted(0, turns=5)])

    async def run() -> None:
        call = asyncio.create_task(router.generate([request(0)]))
        await asyncio.sleep(0)
        with pytest.raises(IllegalState, match="pause or abort"):
            await router.update_weights(weights(1.0), version=1)
        await call

    asyncio.run(run())


# --- revival ---------------------------------------------------------------------------------------------------------


class Machine:
    """Revives engines once they may come back; keeps every one it made."""

    def __init__(self, **script):
        self.up = False
        self.made: list[Scripted] = []
        self.script = script

    def __call__(self, name: str) -> Scripted:
        if not self.up:
            raise EngineDied(f"{name} is still gone")
        self.made.append(Scripted(int(name.split()[1]), **self.script))
        return self.made[-1]


def kill(router: Router, engine: Scripted) -> None:
    engine.dead = True
    asyncio.run(router.health())


def test_an_engine_that_is_back_takes_requests_only_after_the_next_update():
    machine, engines = Machine(), [Scripted(0), Scripted(1)]
    router = route(engines, revive=machine, retry_every=0.005)
    asyncio.run(router.update_weights(weights(1.0), version=1))
    kill(router, engines[0])
    machine.up = True
    until(lambda: bool(machine.made))
    until(lambda: router.members[0].state == "unsynced")
    results = generate(router, [request(index, prompt=[index]) for index in range(10)])
    assert {result.response_ids[0] for result in results} == {1}
    asyncio.run(router.update_weights(weights(2.0), version=2))
    results = generate(router, [request(index, prompt=[index]) for index in range(10)])
    assert {result.response_ids[0] for result in results} == {0, 1}
    assert {result.weight_versions[0][0] for result in results} == {2}
    asyncio.run(router.close())


def test_an_engine_that_is_back_gets_saved_weights_at_once():
    machine, engines, forgotten = Machine(), [Scripted(0), Scripted(1)], []
    save = {"save": lambda stream, version: list(stream), "forget": forgotten.append}
    router = route(engines, revive=machine, retry_every=0.005, **save)
    asyncio.run(router.update_weights(weights(1.0), version=1))
    asyncio.run(router.update_weights(weights(2.0), version=2))
    assert [float(saved[0][1]) for saved in forgotten] == [1.0]
    kill(router, engines[0])
    machine.up = True
    until(lambda: router.members[0].state == "used")
    assert machine.made[0].version == 2
    assert machine.made[0].weights == engines[1].weights
    assert {r.response_ids[0] for r in generate(router, [request(i, prompt=[i]) for i in range(10)])} == {0, 1}
    asyncio.run(router.close())
    assert len(forgotten) == 2


def test_an_engine_that_is_back_joins_in_the_state_of_the_others():
    machine = Machine(sleeps=("weights", "kv_cache"))
    engines = [Scripted(number, sleeps=("weights", "kv_cache")) for number in range(2)]
    router = route(engines, revive=machine, retry_every=0.005)
    kill(router, engines[0])
    asyncio.run(router.pause())
    asyncio.run(router.sleep(["weights", "kv_cache"]))
    asyncio.run(router.wake(["weights"]))
    machine.up = True
    until(lambda: router.members[0].state == "unsynced")
    asyncio.run(router.update_weights(weights(1.0), version=1))
    asyncio.run(router.wake(["kv_cache"]))
    asyncio.run(router.resume())
    assert machine.made[0].orders == ["pause", "sleep kv_cache", "wake kv_cache", "resume"]
    asyncio.run(router.close())


def test_when_the_only_engine_left_has_no_weights_yet_the_error_says_so():
    machine, engines = Machine(), [Scripted(0), Scripted(1)]
    router = route(engines, revive=machine, retry_every=0.005)
    kill(router, engines[0])
    machine.up = True
    until(lambda: router.members[0].state == "unsynced")
    engines[1].dead = True
    machine.up = False
    with pytest.raises(EngineDied, match="engine 0: is back, but has not been given weights yet"):
        generate(router, [request(0)])
    asyncio.run(router.close())


def test_an_engine_that_dies_as_it_joins_the_others_costs_nothing_but_itself():
    machine = Machine(sleeps=("weights", "kv_cache"))
    engines = [Scripted(number, sleeps=("weights", "kv_cache")) for number in range(2)]
    router = route(engines, revive=machine, retry_every=0.005)
    kill(router, engines[0])
    machine.up = True
    until(lambda: router.members[0].state == "unsynced")
    machine.up = False
    asyncio.run(router.sleep(["kv_cache"]))

    async def die(tags: Sequence[MemoryTag]) -> None:
        raise EngineDied("gone in the middle of it")

    machine.made[0].sleep = die
    asyncio.run(router.update_weights(weights(1.0), version=1))
    assert [member.state for member in router.members] == ["dead", "used"]
    assert router.members[0].death == "gone in the middle of it"
    asyncio.run(router.close())


def test_why_an_engine_that_answers_again_cannot_be_used_is_said_once():
    tried, notes = [], []

    def revive(name: str) -> Scripted:
        tried.append(name)
        raise UserError("it serves another model" if len(tried) < 5 else "it wants a key")

    engines = [Scripted(0), Scripted(1)]
    router = route(engines, revive=revive, retry_every=0.005, note=notes.append)
    kill(router, engines[0])
    until(lambda: len(tried) > 9)
    asyncio.run(router.close())
    assert [note.rpartition(": ")[2] for note in notes[1:]] == ["it serves another model", "it wants a key"]


def test_an_engine_that_dies_again_is_revived_again():
    machine, engines = Machine(), [Scripted(0), Scripted(1)]
    router = route(engines, revive=machine, retry_every=0.005)
    machine.up = True
    kill(router, engines[0])
    for _ in range(2):
        until(lambda: router.members[0].state == "unsynced")
        asyncio.run(router.update_weights(weights(1.0), version=1))
        kill(router, machine.made[-1])
    until(lambda: len(machine.made) == 3)
    asyncio.run(router.close())


# --- restarts: a bound on revivals -----------------------------------------------------------------------------------


class Restarts:
    """What the attempts at dead engines come to, in order: the script of the one that comes up, or an error. After
    those, engines that live. No attempt ends before ``may_end`` is set, as it is at first."""

    def __init__(self, *outcomes: dict | Exception, of: type[Scripted] = Scripted):
        self.outcomes, self.of = list(outcomes), of
        self.made: list[Scripted] = []
        self.tried = 0
        self.may_end = threading.Event()
        self.may_end.set()

    def __call__(self, name: str) -> Scripted:
        self.tried += 1
        assert self.may_end.wait(20)
        outcome = self.outcomes.pop(0) if self.outcomes else {}
        if isinstance(outcome, Exception):
            raise outcome
        self.made.append(self.of(int(name.split()[1]), **outcome))
        return self.made[-1]


def restarting(engines: Sequence[Scripted], restarts: Restarts, revivals: int = 1, **options) -> Router:
    options = {"save": lambda stream, version: list(stream), "retry_every": 0.005} | options
    return route(engines, revive=restarts, revivals=revivals, **options)


def update(router: Router, value: float, version: int) -> None:
    asyncio.run(router.update_weights(weights(value), version))


def requests(count: int) -> list[Request]:
    return [request(index, prompt=[index]) for index in range(count)]


def served(*engines: Scripted) -> list[str]:
    return sorted((id for engine in engines for id in engine.served), key=int)


def close(router: Router) -> None:
    asyncio.run(router.close())


def test_the_only_engine_dies_while_it_generates_and_generates_the_rest_when_it_is_back():
    restarts, engine = Restarts(), Scripted(0, dies_after=3, turns=2)
    router = restarting([engine], restarts, retry_every=60)  # the first attempt does not wait for that
    update(router, 1.0, version=7)
    results = generate(router, requests(8))
    assert [(result.id, result.finish_reason) for result in results] == [(str(index), "stop") for index in range(8)]
    assert served(engine, *restarts.made) == [str(index) for index in range(8)]
    assert len(engine.served) == 3
    assert all(result.weight_versions == [(7, 0)] for result in results)
    close(router)


@given(
    deaths=st.lists(st.none() | st.integers(0, 8), min_size=1, max_size=3),
    later=st.lists(st.integers(0, 8), max_size=4),
    turns=st.integers(1, 4),
    count=st.integers(0, 30),
)
def test_every_request_is_answered_once_as_long_as_one_engine_comes_back(deaths, later, turns, count):
    engines = [Scripted(number, turns=turns, dies_after=death) for number, death in enumerate(deaths)]
    restarts = Restarts(*({"dies_after": death, "turns": turns} for death in later))
    router = restarting(engines, restarts, revivals=len(later) + 1)
    update(router, 1.0, version=1)
    results = generate(router, requests(count))
    assert [result.id for result in results] == [str(index) for index in range(count)]
    assert {result.finish_reason for result in results} <= {"stop"}
    assert served(*engines, *restarts.made) == [str(index) for index in range(count)]
    assert all(member.tokens == 0 for member in router.members)
    close(router)


def test_an_engine_that_dies_more_often_than_it_may_stays_dead_and_is_said_so_once():
    notes: list[str] = []
    restarts = Restarts({"dies_after": 2}, {"dies_after": 2})
    router = restarting([Scripted(0, dies_after=2)], restarts, revivals=2, note=notes.append)
    update(router, 1.0, version=1)
    for _ in range(2):
        with pytest.raises(EngineDied, match="engine 0: engine 0 is gone"):
            generate(router, requests(9))
    assert restarts.tried == 2
    assert [note for note in notes if "again:" in note] == [
        "rollout: engine 0 was restarted 2 times and is not restarted again: engine 0 is gone"
    ]
    for order in (router.health(), router.sleep(["kv_cache"]), router.update_weights(weights(2.0), 2), router.pause()):
        with pytest.raises(EngineDied, match="no rollout engine is left"):
            asyncio.run(order)
    close(router)


def test_a_start_that_fails_counts_as_one():
    failures = [EngineDied("out of memory"), EngineDied("no such device")]
    for revivals in (2, 3):
        notes: list[str] = []
        restarts = Restarts(*failures)
        router = restarting([Scripted(0, dies_after=2)], restarts, revivals, note=notes.append)
        update(router, 1.0, version=1)
        if revivals == 2:
            with pytest.raises(EngineDied, match="engine 0: no such device"):
                generate(router, requests(5))
            assert notes[-1] == "rollout: engine 0 was restarted 2 times and is not restarted again: no such device"
        else:
            assert len(generate(router, requests(5))) == 5
        assert restarts.tried == revivals
        assert "rollout: engine 0 could not be brought back: out of memory" in notes
        close(router)


def test_an_engine_that_is_refused_is_given_up_at_once():
    notes: list[str] = []
    restarts = Restarts(UserError("rank 3 is gone"))
    router = restarting([Scripted(0, dies_after=2)], restarts, revivals=5, note=notes.append)
    update(router, 1.0, version=1)
    with pytest.raises(EngineDied, match="engine 0: engine 0 is gone; it cannot be used: rank 3 is gone"):
        generate(router, requests(5))
    assert restarts.tried == 1
    assert [note for note in notes if "rank 3" in note] == ["rollout: engine 0 cannot be brought back: rank 3 is gone"]
    close(router)


def test_an_updates_seconds_are_those_of_the_slowest_member_in_use():
    engines = [Scripted(0), Scripted(2), Scripted(1), Scripted(3, dies_after=0)]
    router = Router([Replica(f"engine {engine.number}", engine) for engine in engines])
    update(router, 1.0, version=1)
    assert router.update_seconds == {"gather": 3.0, "wait": 1.0}
    engines[3].dead = True
    update(router, 2.0, version=2)
    assert router.update_seconds == {"gather": 2.0, "wait": 1.0}
    close(router)


def test_weights_that_a_restarted_engine_refuses_end_the_wait_with_the_reason():
    class Refuses(Scripted):
        async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
            raise UserError("no such tensor: w3")

    router = restarting([Scripted(0, dies_after=2)], Restarts(of=Refuses))
    update(router, 1.0, version=1)
    with pytest.raises(EngineDied, match="has not been given weights yet; it cannot be used: no such tensor: w3"):
        generate(router, requests(5))
    close(router)


def test_one_of_two_is_restarted_while_the_other_generates():
    restarts, engines = Restarts(), [Scripted(0, dies_after=2), Scripted(1, turns=2)]
    router = restarting(engines, restarts)
    update(router, 1.0, version=1)

    async def run() -> list[Result]:
        first = await router.generate(requests(12))
        while router.members[0].state != "used":
            first += await router.generate([request(f"1{len(first):05}")])
        return first + await router.generate([request(f"2{index:05}", prompt=[index]) for index in range(12)])

    results = asyncio.run(run())
    assert {result.finish_reason for result in results} == {"stop"}
    assert served(*engines, *restarts.made) == sorted((result.id for result in results), key=int)
    assert len(restarts.made[0].served) > 0
    close(router)


def test_requests_that_wait_for_an_engine_can_be_aborted():
    restarts, engine = Restarts(), Scripted(0, dies_after=0)
    router = restarting([engine], restarts)
    update(router, 1.0, version=1)
    restarts.may_end.clear()

    async def run() -> tuple[Result, list[Result]]:
        first = asyncio.create_task(router.generate([request("first")]))
        others = asyncio.create_task(router.generate(requests(3)))
        while not restarts.tried:
            await asyncio.sleep(0)
        await router.abort(["first"])
        (aborted,) = await asyncio.wait_for(first, 5)
        assert not others.done()
        restarts.may_end.set()
        return aborted, await others

    aborted, others = asyncio.run(run())
    assert (aborted.finish_reason, aborted.response_ids) == ("abort", [])
    assert [result.finish_reason for result in others] == ["stop"] * 3
    assert "first" not in restarts.made[0].served
    close(router)


def test_close_ends_requests_and_orders_that_wait_and_closes_an_engine_that_comes_late():
    restarts, engine = Restarts(), Scripted(0, dies_after=0)
    router = restarting([engine], restarts)
    update(router, 1.0, version=1)
    restarts.may_end.clear()

    async def run() -> list[Result]:
        call = asyncio.create_task(router.generate(requests(3)))
        while not restarts.tried:
            await asyncio.sleep(0)
        order = asyncio.create_task(asyncio.to_thread(asyncio.run, router.wake(["kv_cache"])))
        closing = asyncio.create_task(asyncio.to_thread(close, router))
        results = await asyncio.wait_for(call, 5)
        with pytest.raises((EngineDied, IllegalState)):
            await asyncio.wait_for(order, 5)
        assert not closing.done()
        restarts.may_end.set()
        await closing
        return results

    assert [result.finish_reason for result in asyncio.run(run())] == ["abort"] * 3
    assert restarts.made[0].orders == ["close"]
    assert restarts.made[0].version == 0


def test_to_wait_for_an_engine_costs_no_work():
    restarts = Restarts()
    router = restarting([Scripted(0, dies_after=0)], restarts)
    update(router, 1.0, version=1)
    restarts.may_end.clear()

    async def run() -> float:
        call = asyncio.create_task(router.generate(requests(500)))
        await asyncio.sleep(0.3)
        before = time.process_time()
        await asyncio.sleep(0.5)
        taken = time.process_time() - before
        restarts.may_end.set()
        await call
        return taken

    assert asyncio.run(run()) < 0.25
    close(router)


def test_a_request_is_generated_again_where_its_dead_engine_never_said_so():
    class Hangs(Scripted):
        """Answers nothing until it is closed."""

        async def one(self, request: Request) -> Result:
            while "close" not in self.orders:
                await asyncio.sleep(0.001)
            return Result(request.id, [9], [-1.0], "abort")

        async def health(self) -> None:
            raise EngineDied("it hangs")

    restarts = Restarts()
    router = restarting([Hangs(0)], restarts)
    update(router, 1.0, version=1)

    async def run() -> list[Result]:
        call = asyncio.create_task(router.generate(requests(3)))
        await asyncio.sleep(0.01)
        await asyncio.to_thread(asyncio.run, router.health())
        return await call

    assert [result.finish_reason for result in asyncio.run(run())] == ["stop"] * 3
    assert served(*restarts.made) == ["0", "1", "2"]
    close(router)


def test_an_update_goes_on_with_the_only_engine_once_it_is_back():
    engine, saved = Scripted(0), []
    restarts = Restarts({"dies_after": 1}, {})
    save = {"save": lambda stream, version: saved.append(version) or list(stream)}
    router = restarting([engine], restarts, revivals=2, **save)
    update(router, 1.0, version=1)
    engine.update_error = EngineDied("engine 0 is gone")
    update(router, 2.0, version=2)
    assert saved == [1, 2]
    assert restarts.made[0].weights["w0"] == 2.0
    assert {result.weight_versions[0][0] for result in generate(router, requests(4))} == {2}
    assert restarts.tried == 2
    close(router)


def test_an_update_whose_stream_cannot_be_read_twice_fails_with_the_last_engine():
    engine, restarts = Scripted(0), Restarts()
    router = restarting([engine], restarts, save=None)
    engine.update_error = EngineDied("engine 0 is gone")
    with pytest.raises(EngineDied, match="no rollout engine is left"):
        update(router, 1.0, version=1)
    update(router, 2.0, version=2)
    assert restarts.made[0].weights["w0"] == 2.0
    assert len(generate(router, requests(2))) == 2
    close(router)


class Strict(Scripted):
    """Refuses what a real engine would: its weights are lost in sleep, and it starts without any. It dies at its order
    number ``dies_at``."""

    def __init__(self, number: int, *, dies_at: int | None = None, **script):
        super().__init__(number, sleeps=("weights", "kv_cache"), **script)
        self.state = EngineState(self.capabilities, keeps_weights=False, no_weights="it has none")
        self.left = dies_at

    def order(self) -> None:
        self.dead = self.dead or self.left == 0
        self.left = None if self.left is None else self.left - 1
        self.check()

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        self.order()
        self.state.check_generate()
        return await super().generate(requests)

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        self.order()
        self.state.check_update("update_weights", len(self.open), 0)
        await super().update_weights(stream, version)
        self.state.no_weights = None

    async def check_weights(self, stream: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        self.order()
        self.state.check_update("check_weights", len(self.open), 0)
        return await super().check_weights(stream)

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self.order()
        self.state.check_sleep(tags, len(self.open), 0)
        self.state.slept(tags)

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        self.order()
        self.state.check_wake(tags)
        self.state.woke(tags)


@pytest.mark.parametrize("others", [0, 1])
@pytest.mark.parametrize("dies_at", range(16))
@pytest.mark.parametrize("again_at", [None, 0, 1, 2])
def test_an_engine_may_die_at_any_point_of_a_step(others, dies_at, again_at):
    """As the trainer does it: an engine and the models in training take turns."""
    restarts = Restarts({"dies_at": again_at}, of=Strict)
    engines = [Strict(0, dies_at=dies_at)] + [Strict(1 + number) for number in range(others)]
    router = restarting(engines, restarts, revivals=2)
    asyncio.run(router.sleep(["kv_cache", "weights"]))
    for step in range(1, 3):
        asyncio.run(router.wake(["weights"]))
        update(router, float(step), version=step)
        assert asyncio.run(router.check_weights(weights(float(step)))) == []
        asyncio.run(router.wake(["kv_cache"]))
        results = generate(router, requests(4))
        assert [result.finish_reason for result in results] == ["stop"] * 4
        assert {result.weight_versions[0] for result in results} == {(step, 0)}
        asyncio.run(router.sleep(["kv_cache", "weights"]))
    alive = [member for member in router.members if member.state != "dead"]
    assert all(member.engine.state.awake == set() for member in alive)  # the models have all of the memory
    close(router)


def test_an_engine_that_died_while_all_slept_is_built_when_they_wake_and_used_after_an_update():
    restarts, engines = Restarts(of=Strict), [Strict(0), Strict(1)]
    router = restarting(engines, restarts)
    update(router, 1.0, version=1)
    asyncio.run(router.sleep(["kv_cache", "weights"]))
    kill(router, engines[0])
    time.sleep(0.3)
    assert not restarts.made  # the memory is the trainer's
    asyncio.run(router.wake(["weights"]))
    update(router, 2.0, version=2)
    asyncio.run(router.wake(["kv_cache"]))
    until(lambda: router.members[0].state == "unsynced")
    assert {result.response_ids[0] for result in generate(router, requests(10))} == {1}
    asyncio.run(router.sleep(["kv_cache"]))
    assert restarts.made[0].state.awake == {"weights"}
    update(router, 3.0, version=3)
    asyncio.run(router.wake(["kv_cache"]))
    assert restarts.made[0].weights == engines[1].weights
    assert {result.response_ids[0] for result in generate(router, requests(10))} == {0, 1}
    close(router)


def test_sleep_waits_for_an_engine_that_is_being_built():
    restarts, engines = Restarts(of=Strict), [Strict(0), Strict(1)]
    router = restarting(engines, restarts)
    update(router, 1.0, version=1)
    restarts.may_end.clear()
    kill(router, engines[0])
    until(lambda: restarts.tried > 0)
    order = threading.Thread(target=lambda: asyncio.run(router.sleep(["kv_cache", "weights"])))
    order.start()
    order.join(0.3)
    assert order.is_alive()
    restarts.may_end.set()
    order.join(10)
    assert not order.is_alive()
    assert restarts.made[0].state.awake == engines[1].state.awake == set()
    close(router)


@pytest.mark.parametrize("order", ["health", "sleep", "wake", "check_weights", "update_weights"])
def test_an_order_waits_for_the_only_engine(order):
    restarts, engine = Restarts({"turns": 1}, of=Strict), Strict(0)
    router = restarting([engine], restarts)
    update(router, 1.0, version=1)
    if order == "wake":
        asyncio.run(router.sleep(["kv_cache"]))
    engine.dead = True
    restarts.may_end.clear()
    threading.Thread(target=lambda: (until(lambda: restarts.tried > 0), restarts.may_end.set())).start()
    orders = {
        "health": lambda: router.health(),
        "sleep": lambda: router.sleep(["kv_cache"]),
        "wake": lambda: router.wake(["kv_cache"]),
        "check_weights": lambda: router.check_weights(weights(1.0)),
        "update_weights": lambda: router.update_weights(weights(1.0), 2),
    }
    assert not asyncio.run(orders[order]())
    assert router.members[0].engine is restarts.made[0]
    assert router.members[0].state == "used"
    close(router)


def test_an_engine_that_is_back_waits_with_the_others_where_they_are_paused():
    restarts, engine = Restarts(), Scripted(0, turns=5)
    router = restarting([engine], restarts)
    update(router, 1.0, version=1)

    async def run() -> list[Result]:
        call = asyncio.create_task(router.generate(requests(3)))
        await asyncio.sleep(0)
        await router.pause()
        engine.dead = True
        while router.members[0].engine is engine or router.members[0].state != "used":
            await asyncio.sleep(0.001)
        await router.update_weights(weights(2.0), version=2)
        await asyncio.sleep(0.02)
        assert not restarts.made[0].served
        await router.resume()
        return await call

    assert {result.weight_versions[0] for result in asyncio.run(run())} == {(2, 0)}
    assert restarts.made[0].orders == ["pause", "resume"]
    close(router)


def test_deaths_and_orders_from_several_threads_end_in_no_deadlock():
    restarts = Restarts(*({"dies_after": 3 + index % 5, "turns": 3} for index in range(200)))
    engines = [Scripted(number, dies_after=4, turns=3) for number in range(3)]
    router = restarting(engines, restarts, revivals=1000, retry_every=0.001)
    update(router, 1.0, version=1)
    results: list[Result] = []

    async def generate(caller: int) -> None:
        for turn in range(5):
            asked = [request(f"{caller}{turn:02}{index:02}", prompt=[caller, index]) for index in range(20)]
            results.extend(await router.generate(asked))

    async def order() -> None:
        for version in range(2, 12):
            await router.pause()
            await router.update_weights(weights(float(version)), version)
            await router.resume()
            await router.health()

    threads = [
        threading.Thread(target=lambda work=work: asyncio.run(work)) for work in (generate(1), generate(2), order())
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert {result.finish_reason for result in results} == {"stop"}
    assert served(*engines, *restarts.made) == sorted((result.id for result in results), key=int)
    assert len(results) == 200
    close(router)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_capabilities_are_those_that_all_have():
    both = route([Scripted(0, sleeps=("weights", "kv_cache")), Scripted(1, sleeps=("kv_cache",))]).capabilities
    assert both.sleep == {"kv_cache"}
    assert not both.seeded
    assert both.holds_weights


def test_several_keep_the_prompts_of_all_where_each_keeps_some():
    engines = [Scripted(0), Scripted(1)]
    assert route(engines).capabilities.window is None
    engines[0].capabilities = replace(engines[0].capabilities, window=PromptWindow(10, 2))
    assert route(engines).capabilities.window is None
    engines[1].capabilities = replace(engines[1].capabilities, window=PromptWindow(5, 3))
    assert route(engines).capabilities.window == PromptWindow(15, 5)


def test_health_takes_out_the_dead_and_fails_when_none_is_left():
    engines = [Scripted(0), Scripted(1)]
    router = route(engines)
    kill(router, engines[0])
    assert [member.state for member in router.members] == ["dead", "used"]
    with pytest.raises(EngineDied, match="no rollout engine is left"):
        kill(router, engines[1])


def test_closing_twice_is_no_error_and_a_closed_router_takes_no_orders():
    engine = Scripted(0)
    router = route([engine])
    asyncio.run(router.close())
    asyncio.run(router.close())
    assert engine.orders == ["close"]
    for order in (lambda: router.generate([request(0)]), router.pause, router.resume, router.health):
        with pytest.raises(IllegalState, match="closed"):
            asyncio.run(order())
