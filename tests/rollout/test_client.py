"""What ``ClientEngine`` makes of a backend's reports, and which orders it passes on."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Awaitable, Callable

import pytest
import torch
from fake_backend import EOS, FakeBackend, response, token_at

from verl.errors import UserError
from verl.rollout.client import engine as client
from verl.rollout.client.backend import EngineDied, TokenChunk
from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import IllegalState, Request, Result, SamplingParams, Unsupported

WEIGHTS = [("weight", torch.zeros(2))]


class Letters:
    """Every token is one character."""

    def decode(self, ids: list[int], **_: object) -> str:
        return "".join(chr(0x4E00 + id) for id in ids)


def build(backend: FakeBackend, tokenizer: object = None, no_weights: str | None = None) -> ClientEngine:
    return ClientEngine(
        backend, tokenizer, eos_token_ids=[EOS], max_model_len=400, vocab_size=100, no_weights=no_weights
    )


def one(id: str = "one", prompt: int = 3, **sampling) -> Request:
    """With a prompt of this many tokens."""
    return Request(id, [5] * prompt, SamplingParams(**{"max_new_tokens": 12, **sampling}))


async def turns() -> None:
    """Let every task of the loop go as far as it can."""
    for _ in range(5):
        await asyncio.sleep(0)


async def soon(done: Callable[[], bool]) -> None:
    for _ in range(2000):
        if done():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not come to pass")


def start(engine: ClientEngine, *requests: Request) -> asyncio.Task[list[Result]]:
    return asyncio.create_task(engine.generate(requests))


async def within(seconds: float, work: Awaitable):
    return await asyncio.wait_for(work, seconds)


def assert_forgotten(engine: ClientEngine) -> None:
    """Nothing of any request is left."""
    assert (engine._rows, engine._running, engine._running_id, engine._aborting) == ({}, {}, {}, {})


# --- draws -----------------------------------------------------------------------------------------------------------


def test_a_response_comes_with_a_log_prob_a_token_in_the_order_of_the_requests():
    backend = FakeBackend()
    engine = build(backend)
    backend.go()
    asked = [one("long", prompt=4, max_new_tokens=20), one("short", prompt=2, max_new_tokens=1)]
    long, short = asyncio.run(engine.generate(asked))
    assert (long.response_ids, short.response_ids) == (response(4, 20), response(2, 1))
    assert long.log_probs == [-place / 100 for place in range(4, 24)]
    assert long.weight_versions == short.weight_versions == [(0, 0)]
    assert (long.finish_reason, short.finish_reason) == ("length", "length")
    assert backend.log == ["generate"]  # one order for both
    assert_forgotten(engine)
    backend.closed = True


def test_tokens_are_streamed_only_where_the_client_has_to_watch_them():
    backend = FakeBackend(engine_ends=(EOS, 2))
    engine = ClientEngine(backend, Letters(), eos_token_ids=[EOS, 2], max_model_len=400, vocab_size=100)
    backend.go()
    asked = [
        one("its own ends"),
        one("one more", stop_token_ids=(90,)),
        one("no end", ignore_eos=True),
        one("less than its own ends", ignore_eos=True, stop_token_ids=(90,)),
        one("a string", stop=("x",)),
    ]
    asyncio.run(engine.generate(asked))
    assert [request.stream for request in backend.requests] == [False, False, False, True, True]
    assert [sorted(request.stop_ids) for request in backend.requests] == [[1, 2], [1, 2, 90], [], [90], [1, 2]]
    backend.closed = True


def test_generate_ids_are_never_used_twice_and_none_begins_another():
    backend = FakeBackend()
    engine = build(backend)
    backend.go()
    for _ in range(3):
        asyncio.run(engine.generate([one(str(index), max_new_tokens=1) for index in range(20)]))
    ids = [request.id for request in backend.requests]
    assert len(set(ids)) == 60
    assert not any(a != b and a.startswith(b) for a in ids for b in ids)
    backend.closed = True


def test_the_models_end_token_ends_a_response():
    backend = FakeBackend(ends=[8])
    engine = build(backend)
    backend.go()
    (result,) = asyncio.run(engine.generate([one()]))
    assert (result.response_ids, result.finish_reason) == ([*response(3, 5), EOS], "stop")
    assert "abort" not in backend.log
    backend.closed = True


def test_a_stop_token_that_the_engine_cannot_end_at_ends_the_response_and_aborts_the_generate():
    backend = FakeBackend()
    engine = build(backend)
    stop = token_at(7)

    async def run() -> Result:
        call = start(engine, one(ignore_eos=True, stop_token_ids=(stop,)))
        await turns()
        backend.step(5)  # places 3 to 7
        (result,) = await call
        return result

    result = asyncio.run(run())
    assert (result.response_ids, result.finish_reason) == (response(3, 5), "stop")
    assert backend.log == ["generate", "abort"]
    backend.step(3)
    assert not backend.under_way
    assert_forgotten(engine)


def test_a_stop_string_ends_the_response_and_aborts_the_generate():
    backend = FakeBackend()
    engine = build(backend, Letters())

    async def run() -> Result:
        call = start(engine, one(stop=("never", Letters().decode([token_at(6), token_at(7)]))))
        await turns()
        backend.step(8)
        (result,) = await call
        return result

    result = asyncio.run(run())
    assert (result.response_ids, result.finish_reason) == (response(3, 5), "stop")
    assert backend.log == ["generate", "abort"]


def test_tokens_that_come_after_the_end_are_not_part_of_the_response():
    """An engine may report several tokens at once, and goes on until the recall reaches it."""
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        call = start(engine, one(ignore_eos=True, stop_token_ids=(token_at(4),)))
        await turns()
        (request,) = backend.requests
        engine.received([TokenChunk(request.id, response(3, 6), [-1.0] * 6, None)])
        engine.received([TokenChunk(request.id, response(9, 2), [-1.0] * 2, "length")])
        (result,) = await call
        return result

    result = asyncio.run(run())
    assert result.response_ids == response(3, 2)
    assert len(result.log_probs) == 2
    assert_forgotten(engine)


def test_an_engine_that_runs_out_of_room_early_ends_the_response():
    backend = FakeBackend(room=9)
    engine = build(backend)
    backend.go()
    (result,) = asyncio.run(engine.generate([one()]))
    assert (result.response_ids, result.finish_reason) == (response(3, 6), "length")
    assert_forgotten(engine)
    backend.closed = True


def test_a_failed_generate_fails_only_its_call():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        failing, staying = start(engine, one("failing"), one("beside it")), start(engine, one("staying"))
        await turns()
        backend.step(2)
        backend.fail(backend.requests[0].id, UserError("no room for failing"))
        with pytest.raises(UserError, match="no room for failing"):
            await failing
        backend.step(12)
        return (await staying)[0]

    assert asyncio.run(run()).response_ids == response(3, 12)
    backend.step()
    assert not backend.under_way  # the one beside it was recalled: nobody waits for it
    assert_forgotten(engine)


def test_generates_that_cannot_even_be_given_leave_nothing_behind():
    backend = FakeBackend()
    engine = build(backend)
    backend.fails["generate"] = TypeError("cannot pickle this image")
    with pytest.raises(TypeError, match="image"):
        asyncio.run(engine.generate([one()]))
    assert_forgotten(engine)
    backend.fails.clear()
    backend.go()
    asyncio.run(engine.generate([one()]))
    backend.closed = True


# --- pause and resume ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"ignore_eos": True, "stop_token_ids": (9,)}], ids=["at once", "streamed"])
def test_what_was_generated_before_a_pause_is_kept_and_the_rest_generated_after_it(sampling):
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        call = start(engine, one(**sampling))
        await turns()
        for pauses in range(1, 4):
            backend.step(pauses)
            pause = asyncio.create_task(engine.pause())
            await turns()
            assert not pause.done()
            backend.step()  # the draw ends
            await pause
            assert not backend.under_way
            await engine.update_weights(WEIGHTS, version=pauses)
            await engine.resume()
        backend.step(6)
        return (await call)[0]

    result = asyncio.run(run())
    assert result.response_ids == response(3, 12)
    assert result.log_probs == [-place / 100 for place in range(3, 15)]
    assert result.weight_versions == [(0, 0), (1, 1), (2, 3), (3, 6)]
    asked = [(request.prompt_ids, request.max_new_tokens) for request in backend.requests]
    assert asked == [([5] * 3 + response(3, generated), 12 - generated) for generated in (0, 1, 3, 6)]
    assert_forgotten(engine)


def test_requests_that_come_in_a_pause_wait_for_its_end():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        await engine.pause()
        call = start(engine, one())
        await turns()
        assert not backend.requests
        await engine.resume()
        backend.step(12)
        return (await call)[0]

    assert asyncio.run(run()).response_ids == response(3, 12)


def test_a_response_that_ends_by_itself_while_it_is_aborted_is_whole():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> tuple[Result, Result]:
        calls = start(engine, one("a", max_new_tokens=1)), start(engine, one("b", max_new_tokens=1))
        await turns()
        pause, abort = asyncio.create_task(engine.pause()), asyncio.create_task(engine.abort(["b"]))
        await turns()
        backend.end_by_itself("length")
        await asyncio.gather(pause, abort)
        return (await calls[0])[0], (await calls[1])[0]

    for result in asyncio.run(run()):
        assert (result.response_ids, result.finish_reason) == (response(3, 1), "length")
    assert_forgotten(engine)


def test_an_engine_cannot_be_resumed_or_updated_while_it_still_generates_what_a_pause_aborted():
    """Also not when nobody waits for the pause any more: the engine would be given the same response twice."""
    backend = FakeBackend(sleep=("weights", "kv_cache"))
    engine = build(backend)

    async def run() -> Result:
        call = start(engine, one())
        await turns()
        backend.step(2)
        with pytest.raises(TimeoutError):
            await within(0.01, engine.pause())
        before = list(backend.log)
        for order in (
            engine.resume(),
            engine.update_weights(WEIGHTS, version=1),
            engine.check_weights(WEIGHTS),
            engine.sleep(["kv_cache"]),
        ):
            with pytest.raises(IllegalState, match="still being drawn"):
                await order
        assert backend.log == before
        backend.step()
        await engine.update_weights(WEIGHTS, version=1)
        await engine.resume()
        backend.step(10)
        return (await within(5, call))[0]

    assert asyncio.run(run()).response_ids == response(3, 12)
    assert_forgotten(engine)


# --- abort, cancel ---------------------------------------------------------------------------------------------------


def test_abort_hands_out_what_was_generated():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> tuple[Result, Result]:
        calls = start(engine, one("a")), start(engine, one("b"))
        await turns()
        backend.step(4)
        abort = asyncio.create_task(engine.abort(["a", "nobody"]))
        await turns()
        backend.step()
        await abort
        (aborted,) = await calls[0]
        backend.step(7)
        return aborted, (await calls[1])[0]

    aborted, other = asyncio.run(run())
    assert (aborted.response_ids, aborted.finish_reason) == (response(3, 4), "abort")
    assert (other.response_ids, other.finish_reason) == (response(3, 12), "length")


def test_abort_in_a_pause_ends_requests_at_once_with_what_they_have():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> tuple[Result, Result]:
        early = start(engine, one("early"))
        await turns()
        backend.step(2)
        pause = asyncio.create_task(engine.pause())
        await turns()
        backend.step()
        await pause
        late = start(engine, one("late"))
        await turns()
        await engine.abort()
        return (await early)[0], (await late)[0]

    early, late = asyncio.run(run())
    assert (early.response_ids, early.finish_reason) == (response(3, 2), "abort")
    assert (late.response_ids, late.finish_reason, late.weight_versions) == ([], "abort", [])
    assert_forgotten(engine)


def test_an_abort_that_nobody_waits_for_any_more_still_ends_the_requests():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        call = start(engine, one())
        await turns()
        backend.step(2)
        with pytest.raises(TimeoutError):
            await within(0.01, engine.abort())
        backend.step()  # the end of a draw that two have given up: no error in the backend's thread
        await within(5, engine.abort())
        return (await within(5, call))[0]

    assert asyncio.run(run()).finish_reason == "abort"
    assert_forgotten(engine)
    assert not backend.under_way


def test_an_aborted_request_is_not_resumed():
    """The pause has ended its draw before the abort, which waits for the same end, goes on."""
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        call = start(engine, one())
        await turns()
        backend.step(2)
        pause = asyncio.create_task(engine.pause())
        await turns()
        abort = asyncio.create_task(engine.abort())
        await asyncio.sleep(0)
        backend.step()
        await engine.resume()  # before either hears of it
        await asyncio.gather(pause, abort)
        return (await call)[0]

    assert asyncio.run(run()).finish_reason == "abort"
    backend.step()
    assert not backend.under_way
    assert_forgotten(engine)


def test_an_id_may_be_used_again_as_soon_as_its_request_has_ended():
    """Whoever aborted the first one, and hears of its end late, does not meddle with the second."""
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        first = start(engine, one(max_new_tokens=1))
        await turns()
        abort = asyncio.create_task(engine.abort())
        await turns()
        backend.end_by_itself("length")
        second = start(engine, one(prompt=6))
        await asyncio.sleep(0)
        assert len(backend.requests) == 2
        assert not abort.done()
        await asyncio.gather(first, abort)
        backend.step(12)
        return (await within(5, second))[0]

    result = asyncio.run(run())
    assert (result.response_ids, result.finish_reason) == (response(6, 12), "length")
    assert_forgotten(engine)


def test_a_cancelled_caller_leaves_nothing_behind():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> Result:
        leaving, staying = start(engine, one("leaving")), start(engine, one("staying"))
        await turns()
        backend.step(2)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        again = start(engine, one("leaving", prompt=5))
        await turns()
        backend.step(12)
        assert (await again)[0].response_ids == response(5, 12)
        return (await staying)[0]

    assert asyncio.run(run()).response_ids == response(3, 12)
    assert not backend.under_way
    assert_forgotten(engine)


def test_callers_that_come_and_go_at_any_moment_disturb_nobody():
    """Cancellations race with the reports of the backend's thread, which has to survive them all."""
    backend = FakeBackend()
    engine = build(backend)
    failed: list[object] = []
    hook, threading.excepthook = threading.excepthook, failed.append

    async def run() -> None:
        async def caller(index: int) -> None:
            call = start(engine, one(str(index), max_new_tokens=1 + index % 5))
            await asyncio.sleep(0.0005 * (index % 7))
            if index % 2:
                call.cancel()
            await asyncio.gather(call, return_exceptions=True)
            assert call.cancelled() or call.result()[0].response_ids == response(3, 1 + index % 5)

        for first in range(0, 400, 100):
            await within(10, asyncio.gather(*(caller(index) for index in range(first, first + 100))))

    try:
        backend.go()
        asyncio.run(run())
    finally:
        threading.excepthook = hook
    assert not failed
    engine.received([])
    asyncio.run(soon(lambda: not backend.under_way))
    backend.closed = True
    assert not engine._rows


def test_one_engine_serves_several_event_loops():
    backend = FakeBackend()
    engine = build(backend)
    backend.go()
    results: dict[int, list[Result]] = {}

    def serve(index: int) -> None:
        asked = [one(f"{index} {number}", prompt=1 + index) for number in range(5)]
        results[index] = asyncio.run(engine.generate(asked))

    threads = [threading.Thread(target=serve, args=[index]) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert all(result.response_ids == response(1 + index, 12) for index in range(6) for result in results[index])

    async def interrupted() -> None:
        start(engine, one("left alone", max_new_tokens=300))
        await turns()

    asyncio.run(interrupted())  # its loop ends under it
    assert asyncio.run(engine.generate([one("left alone")]))[0].response_ids == response(3, 12)
    backend.closed = True


# --- weights ---------------------------------------------------------------------------------------------------------


def test_an_engine_without_weights_generates_nothing():
    backend = FakeBackend()
    engine = build(backend, no_weights="it has not been given any weights")
    with pytest.raises(IllegalState, match="not been given any weights; call update_weights first"):
        asyncio.run(engine.generate([one()]))
    asyncio.run(engine.update_weights(WEIGHTS, version=3))
    backend.go()
    (result,) = asyncio.run(engine.generate([one()]))
    assert result.weight_versions == [(3, 0)]
    backend.closed = True


def test_after_a_weight_update_that_failed_nothing_is_generated_until_one_that_did_not():
    backend = FakeBackend()
    engine = build(backend)

    def breaks():
        yield "weight", torch.zeros(2)
        raise KeyboardInterrupt

    async def run() -> None:
        call = start(engine, one())
        await turns()
        backend.step(2)
        pause = asyncio.create_task(engine.pause())
        await turns()
        backend.step()
        await pause
        with pytest.raises(UserError, match="no place"):
            await engine.update_weights([("wrong", torch.zeros(1))], version=1)
        for order in (engine.resume(), engine.generate([one("other")])):
            with pytest.raises(IllegalState, match="did not end well; call update_weights first"):
                await order
        await engine.update_weights(WEIGHTS, version=2)
        with pytest.raises(KeyboardInterrupt):
            await engine.update_weights(breaks(), version=3)
        with pytest.raises(IllegalState, match="did not end well"):
            await engine.resume()
        await engine.update_weights(WEIGHTS, version=4)
        await engine.resume()
        backend.step(10)
        (result,) = await call
        assert result.response_ids == response(3, 12)
        assert result.weight_versions == [(0, 0), (4, 2)]

    asyncio.run(run())


def test_the_cache_is_dropped_before_each_update_which_waits_for_generates_that_nobody_wants():
    """A response that the client has ended is still being drawn for a while."""
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> None:
        call = start(engine, one(ignore_eos=True, stop_token_ids=(token_at(4),)))
        await turns()
        backend.step(2)
        await call
        assert backend.under_way
        await engine.update_weights(WEIGHTS, version=1)  # the fake asserts that it is idle

    asyncio.run(run())
    assert backend.log == ["generate", "abort", "drop_cache", "update_weights"]


# --- death -----------------------------------------------------------------------------------------------------------


def orders_of(engine: ClientEngine) -> dict[str, Callable[[], Awaitable]]:
    return {
        "generate": lambda: engine.generate([one("later")]),
        "pause": engine.pause,
        "resume": engine.resume,
        "update_weights": lambda: engine.update_weights(WEIGHTS, version=9),
        "check_weights": lambda: engine.check_weights(WEIGHTS),
        "sleep": lambda: engine.sleep(["kv_cache"]),
        "wake": lambda: engine.wake(["kv_cache"]),
        "health": engine.health,
    }


async def assert_dead(engine: ClientEngine, backend: FakeBackend) -> None:
    before = list(backend.log)
    for order in orders_of(engine).values():
        with pytest.raises(EngineDied, match="killed"):
            await order()
    assert backend.log == before
    await engine.abort()
    await engine.close()
    assert backend.log == [*before, "close"]
    assert_forgotten(engine)


@pytest.mark.parametrize("waiting", ["abort", "pause", None])
def test_a_death_in_mid_flight_fails_every_caller_and_every_later_order(waiting):
    backend = FakeBackend(sleep=("weights", "kv_cache"))
    engine = build(backend)

    async def run() -> None:
        calls = [start(engine, one("a"), one("b")), start(engine, one("c"))]
        await turns()
        backend.step(2)
        order = asyncio.create_task(getattr(engine, waiting)()) if waiting else None
        await turns()
        backend.die()
        for call in calls:
            with pytest.raises(EngineDied, match="killed"):
                await within(5, call)
        if order:
            await within(5, order)  # which has nothing to wait for any more
        await assert_dead(engine, backend)

    asyncio.run(run())


def test_a_death_in_a_pause_fails_those_that_wait():
    backend = FakeBackend(sleep=("weights", "kv_cache"))
    engine = build(backend)

    async def run() -> None:
        await engine.pause()
        call = start(engine, one())
        await turns()
        backend.die()
        with pytest.raises(EngineDied, match="killed"):
            await within(5, call)
        await assert_dead(engine, backend)

    asyncio.run(run())


@pytest.mark.parametrize("order", ["update_weights", "health", "drop_cache", "generate"])
def test_an_engine_that_does_not_answer_an_order_is_dead_for_all(order):
    """Before its backend's thread says so, and also where the process is still there but hangs."""
    backend = FakeBackend(sleep=("weights", "kv_cache"))
    engine = build(backend)
    backend.fails[order] = EngineDied("it did not answer and was killed")

    async def run() -> None:
        if order == "health":
            call = start(engine, one())
            await turns()
        given = orders_of(engine)["update_weights" if order == "drop_cache" else order.replace("generate", "generate")]
        with pytest.raises(EngineDied, match="did not answer"):
            await given()
        if order == "health":
            with pytest.raises(EngineDied, match="did not answer"):
                await within(5, call)
        await assert_dead(engine, backend)

    asyncio.run(run())


def test_an_engine_that_hangs_while_it_generates_is_found_out_by_one_look_for_all(monkeypatch):
    monkeypatch.setattr(client, "LOOK_EVERY", 0.05)
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> None:
        calls = [start(engine, one(name)) for name in "abc"]
        while "health" not in backend.log:  # it is well, and slow
            await asyncio.sleep(0.01)
        assert not any(call.done() for call in calls)
        backend.fails = {"health": EngineDied("killed: no answer")}
        for call in calls:
            with pytest.raises(EngineDied, match="no answer"):
                await within(5, call)

    asyncio.run(run())


def test_a_caller_that_leaves_a_dying_engine_leaves_for_its_own_reason():
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> None:
        call = start(engine, one())
        await turns()
        backend.fails["abort"] = EngineDied("it is gone, which nobody has been told yet")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    asyncio.run(run())
    assert not engine._rows


def test_an_engines_death_that_callers_learn_of_as_they_are_cancelled_is_printed_by_nobody():
    """As when one episode's failure ends a run, and asyncio cancels the others."""
    backend, printed = FakeBackend(), []
    engine = build(backend)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: printed.append(context))
        calls = [start(engine, one(name)) for name in "abc"]
        await turns()
        backend.die()
        for turn in range(4):  # the results fail in one of these turns of the loop, their callers wake in the next
            calls[min(turn, 2)].cancel()
            await asyncio.sleep(0)
        await asyncio.gather(*calls, return_exceptions=True)

    asyncio.run(run())
    gc.collect()
    assert not printed


# --- the end ---------------------------------------------------------------------------------------------------------


def test_closing_hands_out_what_was_generated():
    backend = FakeBackend()
    engine = build(backend)
    backend.go()

    async def run() -> Result:
        call = start(engine, one(max_new_tokens=300))
        await soon(lambda: any(len(each.ids) > 3 for each in backend.under_way.values()))
        await engine.close()
        await engine.close()
        return (await call)[0]

    result = asyncio.run(run())
    assert result.finish_reason == "abort"
    assert result.response_ids == response(3, len(result.response_ids)) != []
    assert backend.log.count("close") == 1
    with pytest.raises(IllegalState, match="closed"):
        asyncio.run(engine.generate([one()]))


@pytest.mark.parametrize("abort", [None, EngineDied("gone")], ids=["hangs", "has just died"])
def test_closing_an_engine_that_hangs_or_is_dying_takes_no_longer_than_it_may(monkeypatch, abort):
    monkeypatch.setattr(client, "CLOSE_TIMEOUT", 0.05)
    backend = FakeBackend()
    engine = build(backend)

    async def run() -> None:
        call = start(engine, one())
        await turns()
        if abort:
            backend.fails["abort"] = abort
        await within(5, engine.close())
        assert backend.closed
        if abort:
            backend.die()
            with pytest.raises(EngineDied):
                await within(5, call)
        else:
            assert (await within(5, call))[0].finish_reason == "abort"

    asyncio.run(run())


def test_what_cannot_be_served_never_reaches_the_backend():
    backend = FakeBackend()
    engine = build(backend)
    for request, says in (
        (one(prompt=395), "context length of 400"),
        (one(prompt=0), "empty"),
        (one(max_new_tokens=0), "max_new_tokens=0"),
        (Request("one", [100], SamplingParams()), "vocabulary"),
    ):
        with pytest.raises(UserError, match=says):
            asyncio.run(engine.generate([one("fine"), request]))
    for request in (one(stop=("x",)), Request("one", [5], SamplingParams(), images=("a.png",))):
        with pytest.raises(Unsupported):
            asyncio.run(engine.generate([one("fine"), request]))
    with pytest.raises(IllegalState, match="'twice' is already in flight"):
        asyncio.run(engine.generate([one("twice"), one("twice")]))
    assert backend.log == []
    assert_forgotten(engine)
