"""Several engines as one: balance, prompts kept together, deaths, and revival. The engines here are scripted."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.errors import UserError
from verl.rollout.backend import EngineDied
from verl.rollout.base import Capabilities, IllegalState, MemoryTag, Request, Result, SamplingParams
from verl.rollout.router import KEEP_TOGETHER, Member, Router


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
    return Router([Member(f"engine {engine.number}", engine) for engine in engines], **options)


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
    assert not router._homes
    assert not router._flights


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


# --- the rest --------------------------------------------------------------------------------------------------------


def test_capabilities_are_those_that_all_have():
    both = route([Scripted(0, sleeps=("weights", "kv_cache")), Scripted(1, sleeps=("kv_cache",))]).capabilities
    assert both.sleep == {"kv_cache"}
    assert not both.seeded
    assert both.holds_weights


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
