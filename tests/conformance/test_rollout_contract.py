"""The contract of ``verl.rollout.contract.base``, stated once and held by every engine in conftest's ``KITS``.

A test's docstring is its row in docs/engines.md: the part of the table, and what holds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
import torch

from verl.errors import UserError
from verl.rollout.contract.base import IllegalState, Request, Result, RolloutEngine, SamplingParams, Unsupported

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15, 16], [20, 21], [30, 31, 32, 33]]


def requests(kit, **sampling) -> list[Request]:
    """Ten requests, two of each prompt, which run to their length unless told otherwise."""
    settings = {"max_new_tokens": 24, "ignore_eos": True, **sampling}
    return [
        Request(str(index), prompt, SamplingParams(**{"seed": 100 + index, **settings}))
        for index, prompt in enumerate([*PROMPTS, *PROMPTS])
    ]


def one(prompt: Sequence[int] = (5, 6, 7), id: str = "one", **sampling) -> Request:
    return Request(id, prompt, SamplingParams(**{"max_new_tokens": 24, "ignore_eos": True, "seed": 3, **sampling}))


def generate(engine: RolloutEngine, requests: list[Request]) -> list[Result]:
    return asyncio.run(engine.generate(requests))


def reference_log_probs(kit, request: Request, response: list[int]) -> torch.Tensor:
    """Of every token of the vocabulary at every place of the response, by a plain forward: shape (T, V)."""
    ids = torch.tensor([[*request.prompt_ids, *response]], device=kit.trainer.device)
    with torch.no_grad():
        logits = kit.trainer(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
    return (logits.float() / (request.sampling.temperature or 1.0)).log_softmax(-1).cpu()


def assert_log_probs_match(kit, request: Request, result: Result) -> None:
    found = torch.tensor(result.log_probs)
    ids = torch.tensor(result.response_ids)[:, None]
    expected = reference_log_probs(kit, request, result.response_ids).gather(-1, ids)[:, 0]
    torch.testing.assert_close(found, expected, atol=kit.tolerance, rtol=0)


def assert_greedy(kit, request: Request, result: Result, banned: Sequence[int] = ()) -> None:
    """Every token is the most probable one, or one that is as probable to within the tolerance."""
    log_probs = reference_log_probs(kit, request, result.response_ids)
    log_probs[:, list(banned)] = -torch.inf
    chosen = log_probs.gather(-1, torch.tensor(result.response_ids)[:, None])[:, 0]
    assert len(result.response_ids) == request.sampling.max_new_tokens
    torch.testing.assert_close(chosen, log_probs.amax(-1), atol=2 * kit.tolerance, rtol=0)


# --- what comes out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 1.7},
        {"temperature": 0},
        {"top_p": 0.7},
        {"top_k": 5, "temperature": 1.3},
        {"min_p": 0.2},
        {"top_k": 30, "top_p": 0.8, "min_p": 0.05, "temperature": 0.9},
    ],
    ids=str,
)
def test_log_probs_are_the_trainers_over_the_full_vocabulary_at_the_sampling_temperature(kit, sampling):
    """Log-probs: the trainer's, at the sampling temperature, over the full vocabulary whatever is left out of it."""
    asked = requests(kit, **sampling)
    for request, result in zip(asked, generate(kit.build(), asked), strict=True):
        assert len(result.response_ids) == len(result.log_probs) == 24
        assert_log_probs_match(kit, request, result)


def test_results_come_in_the_order_of_the_requests(kit):
    """Generation: results come in the order of the requests, however long each response is."""
    asked = [one(id=f"r{length}", max_new_tokens=length) for length in (40, 3, 17, 1, 29)]
    results = generate(kit.build(max_num_seqs=2), asked)
    assert [result.id for result in results] == [request.id for request in asked]
    assert [len(result.response_ids) for result in results] == [40, 3, 17, 1, 29]
    assert all(result.finish_reason == "length" for result in results)
    assert all(result.weight_versions == [(0, 0)] for result in results)


def test_no_requests_give_no_results(kit):
    """Generation: a call without requests is answered at once."""
    assert generate(kit.build(), []) == []


def test_temperature_zero_takes_the_most_probable_token(kit):
    """Sampling: `temperature=0` takes the most probable token."""
    asked = requests(kit, temperature=0)
    for request, result in zip(asked, generate(kit.build(), asked), strict=True):
        assert_greedy(kit, request, result)


def test_top_k_of_one_takes_the_most_probable_token(kit):
    """Sampling: `top_k=1` takes the most probable token."""
    asked = requests(kit, top_k=1, temperature=1.5)
    for request, result in zip(asked, generate(kit.build(), asked), strict=True):
        assert_greedy(kit, request, result)


@pytest.mark.parametrize("sampling", [{"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}], ids=str)
def test_filtered_tokens_are_never_generated(kit, sampling):
    """Sampling: what `top_k`, `top_p` and `min_p` leave out is never drawn."""
    asked = requests(kit, temperature=1.4, **sampling)
    for request, result in zip(asked, generate(kit.build(), asked), strict=True):
        probs = reference_log_probs(kit, request, result.response_ids).exp()
        generated = probs.gather(-1, torch.tensor(result.response_ids)[:, None])
        better = torch.where(probs > generated * (1 + 2 * kit.tolerance) + 1e-5, probs, 0)
        if "top_k" in sampling:
            assert ((better > 0).sum(-1) < 3).all()
        elif "top_p" in sampling:
            assert (better.sum(-1) < 0.5 + 1e-4).all()
        else:
            assert (generated >= 0.3 * probs.amax(-1, keepdim=True) * (1 - 2 * kit.tolerance) - 1e-5).all()


def test_settings_of_one_request_do_not_reach_another(kit):
    """Sampling: each request of a batch has its own settings."""
    mixed = [one(id="greedy", temperature=0), one(id="hot", temperature=1.5), one(id="nucleus", top_p=0.3)]
    together = generate(kit.build(), mixed)
    assert_greedy(kit, mixed[0], together[0])
    for request, result in zip(mixed, together, strict=True):
        assert_log_probs_match(kit, request, result)


# --- seeds -----------------------------------------------------------------------------------------------------------


def test_the_same_prompt_and_seed_give_the_same_tokens_in_any_batch(kit):
    """Seeds: the same prompt and seed give the same tokens in any batch."""
    engine = kit.build()
    if not engine.capabilities.seeded:
        pytest.skip("not seeded")
    asked = requests(kit)
    together = generate(engine, asked)
    alone = [generate(engine, [request])[0] for request in asked]
    narrow = generate(kit.build(max_num_seqs=3), asked[::-1])[::-1]
    expected = [result.response_ids for result in together]
    assert [result.response_ids for result in alone] == expected
    assert [result.response_ids for result in narrow] == expected


def test_another_seed_gives_other_tokens(kit):
    """Seeds: requests with other seeds get other tokens."""
    engine = kit.build()
    generated = generate(engine, [one(id=str(seed), seed=seed) for seed in range(5)])
    assert len({tuple(result.response_ids) for result in generated}) == 5


# --- how responses end -----------------------------------------------------------------------------------------------


def test_the_end_token_stops_a_response_and_is_part_of_it(kit):
    """Ends: the end token ends a response, and is part of it."""
    asked = [one(id=str(seed), seed=seed, max_new_tokens=100, ignore_eos=False, temperature=2.0) for seed in range(20)]
    results = generate(kit.build(), asked)
    stopped = [result for result in results if result.finish_reason == "stop"]
    assert len(stopped) > 3
    for result in stopped:
        assert result.response_ids.index(kit.eos) == len(result.response_ids) - 1
        assert len(result.log_probs) == len(result.response_ids)
    assert all(kit.eos not in result.response_ids for result in results if result.finish_reason == "length")


def test_a_request_may_ignore_the_end_token_but_not_its_own_stop_tokens(kit):
    """Ends: `stop_token_ids` of a request, together with `ignore_eos`."""
    engine = kit.build()
    (free,) = generate(engine, [one(max_new_tokens=100, temperature=0)])
    stop = free.response_ids[10]
    (stopped,) = generate(engine, [one(max_new_tokens=100, temperature=0, stop_token_ids=(stop,))])
    assert stopped.response_ids.index(stop) == len(stopped.response_ids) - 1
    assert stopped.finish_reason == "stop"
    assert len(stopped.log_probs) == len(stopped.response_ids)
    stops = tuple(range(40, 60))
    asked = [one(id=str(seed), seed=seed, max_new_tokens=100, stop_token_ids=stops) for seed in range(8)]
    for request, result in zip(asked, generate(engine, asked), strict=True):
        assert all(token not in stops for token in result.response_ids[:-1])
        assert (result.response_ids[-1] in stops) == (result.finish_reason == "stop")
        assert_log_probs_match(kit, request, result)


def test_a_stop_string_ends_the_response_with_the_token_that_completed_it(kit):
    """Ends: stop strings, at the token that completes one."""
    engine = kit.build()
    if not engine.capabilities.stop_strings:
        pytest.skip("no stop strings")
    (free,) = generate(engine, [one(temperature=0)])
    stop = kit.tokenizer.decode(free.response_ids[8:11])
    request = one(temperature=0, stop=("never", stop))
    (stopped,) = generate(engine, [request])
    text = kit.tokenizer.decode(stopped.response_ids)
    assert text.index(stop) == len(text) - len(stop)
    assert stopped.finish_reason == "stop"
    assert_log_probs_match(kit, request, stopped)


def test_no_stop_token_is_generated_before_min_new_tokens(kit):
    """Ends: `min_new_tokens`: no stop token is drawn before."""
    engine = kit.build()
    if not engine.capabilities.min_new_tokens:
        pytest.skip("no min_new_tokens")
    stops = tuple(range(1, 60))
    asked = [one(id=str(seed), seed=seed, stop_token_ids=stops, min_new_tokens=9) for seed in range(8)]
    for request, result in zip(asked, generate(engine, asked), strict=True):
        assert len(result.response_ids) >= 9
        assert not set(result.response_ids[:9]) & set(stops)
        assert_log_probs_match(kit, request, result)
    request = one(temperature=0, stop_token_ids=stops, min_new_tokens=24)
    assert_greedy(kit, request, generate(engine, [request])[0], banned=stops)


def test_a_response_may_fill_the_context(kit):
    """Ends: a response may fill the context to its last place."""
    request = one(max_new_tokens=kit.context - 3)
    (result,) = generate(kit.build(), [request])
    assert len(result.response_ids) == kit.context - 3
    assert_log_probs_match(kit, request, result)


# --- many calls, abort, cancel ---------------------------------------------------------------------------------------


def test_hundreds_of_calls_may_be_in_flight_together(kit):
    """Generation: hundreds of calls in flight together."""
    engine = kit.build(max_num_seqs=16)

    async def run() -> list[list[Result]]:
        calls = (
            engine.generate([one(id=str(index), seed=index, max_new_tokens=1 + index % 7)]) for index in range(300)
        )
        return await asyncio.gather(*calls)

    results = asyncio.run(run())
    assert [len(result.response_ids) for (result,) in results] == [1 + index % 7 for index in range(300)]


def test_abort_gives_back_what_was_generated_and_leaves_the_others(kit):
    """Abort: a request gives back what was drawn, with its log-probs, and the others go on."""
    engine = kit.build(max_num_seqs=2)
    long, short = one(id="long", max_new_tokens=100), one(id="short", max_new_tokens=90, seed=4)
    queued = one(id="queued", seed=5)

    async def run() -> list[list[Result]]:
        calls = [asyncio.create_task(engine.generate([request])) for request in (long, short, queued)]
        await kit.generate_some()
        await engine.abort(["long", "nobody"])
        return await asyncio.gather(*calls)

    (aborted,), (other,), (later,) = asyncio.run(run())
    assert aborted.finish_reason == "abort"
    assert 0 < len(aborted.response_ids) < 100
    assert_log_probs_match(kit, long, aborted)
    assert (len(other.response_ids), other.finish_reason) == (90, "length")
    assert (len(later.response_ids), later.finish_reason) == (24, "length")
    for request, result in ((short, other), (queued, later)):
        assert_log_probs_match(kit, request, result)


def test_abort_without_ids_ends_everything_also_what_waits(kit):
    """Abort: all requests at once, also those that wait."""
    engine = kit.build(max_num_seqs=2)
    asked = requests(kit, max_new_tokens=100)

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(asked))
        await kit.generate_some()
        await engine.abort()
        return await call

    results = asyncio.run(run())
    assert {result.finish_reason for result in results} == {"abort"}
    assert sum(bool(result.response_ids) for result in results) == kit.slots(2)
    assert all(result.weight_versions == ([(0, 0)] if result.response_ids else []) for result in results)
    assert len(generate(engine, asked[:1])[0].response_ids) == 100


def test_a_cancelled_call_leaves_nothing_behind(kit):
    """Abort: a call that its caller cancels leaves nothing behind."""
    engine = kit.build(max_num_seqs=2)

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(requests(kit, max_new_tokens=100)))
        await kit.generate_some()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        return await engine.generate([one(id="0")])

    (result,) = asyncio.run(run())
    assert_log_probs_match(kit, one(), result)


def test_cancelling_a_call_at_any_moment_leaves_the_others_alone(kit):
    """Abort: a call may be cancelled at any moment without touching the others."""
    engine = kit.build()
    (expected,) = generate(engine, [one()])

    async def run(turns: int) -> list[Result]:
        leaving = asyncio.create_task(engine.generate([one(id="leaving", max_new_tokens=4)]))
        staying = asyncio.create_task(engine.generate([one()]))
        for _ in range(turns):
            await asyncio.sleep(0)
        leaving.cancel()
        if turns % 2:
            await engine.abort(["leaving", "leaving"])
        return await staying

    for turns in range(9):
        (result,) = asyncio.run(run(turns))
        assert len(result.response_ids) == 24
        assert not engine.capabilities.seeded or result.response_ids == expected.response_ids


def test_an_engine_outlives_event_loops(kit):
    """Generation: one engine serves one event loop after another."""
    engine = kit.build()
    asked = requests(kit)
    first, second = (generate(engine, asked) for _ in range(2))
    assert all(map(kit.same, first, second)) or not engine.capabilities.seeded

    async def interrupted() -> None:
        asyncio.get_running_loop().create_task(engine.generate([one(max_new_tokens=100)]))
        await kit.generate_some()

    asyncio.run(interrupted())
    for request, result, before in zip(asked, generate(engine, asked), first, strict=True):
        assert_log_probs_match(kit, request, result)
        assert kit.same(result, before) or not engine.capabilities.seeded


# --- pause, resume, weights ------------------------------------------------------------------------------------------


def test_a_pause_keeps_what_was_generated_and_holds_new_requests(kit):
    """Pause: requests keep what they have and go on from there; new ones wait."""
    engine = kit.build()
    asked = requests(kit, max_new_tokens=60)
    undisturbed = generate(engine, [*asked, one()])

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(asked))
        await kit.generate_some()
        await engine.pause()
        late = asyncio.create_task(engine.generate([one()]))
        await asyncio.sleep(0.05)
        assert not call.done()
        assert not late.done()
        await engine.resume()
        return [*await call, *await late]

    results = asyncio.run(run())
    assert [len(result.response_ids) for result in results] == [60] * 10 + [24]
    if engine.capabilities.seeded:
        assert [result.response_ids for result in results] == [result.response_ids for result in undisturbed]


def test_after_an_update_partial_responses_go_on_with_the_new_weights(kit):
    """Pause: after a weight update, partial responses go on with the new weights, and say from which token."""
    engine = kit.build(max_num_seqs=6)
    asked = requests(kit, max_new_tokens=60)

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(asked))
        await kit.generate_some()
        await engine.pause()
        kit.train()
        await engine.update_weights(kit.trainer.named_parameters(), version=7)
        await engine.resume()
        return await call

    results = asyncio.run(run())
    seen = set()
    for request, result in zip(asked, results, strict=True):
        assert len(result.response_ids) == 60
        seen.add(tuple(version for version, _ in result.weight_versions))
        version, first = result.weight_versions[-1]
        assert version == 7
        ids = torch.tensor(result.response_ids)[:, None]
        new = reference_log_probs(kit, request, result.response_ids).gather(-1, ids)[:, 0]
        found = torch.tensor(result.log_probs)
        torch.testing.assert_close(found[first:], new[first:], atol=kit.tolerance, rtol=0)
        assert not first or (found[:first] - new[:first]).abs().max() > 0.1
    assert seen == {(0, 7), (7,)}  # those in flight, and those that still waited


def test_an_idle_engine_generates_from_the_updated_weights(kit):
    """Weights: after an update, tokens and log-probs are of the new weights."""
    engine = kit.build()
    before = generate(engine, requests(kit))
    kit.train()
    asyncio.run(engine.update_weights(kit.trainer.named_parameters(), version=1))
    asked = requests(kit)
    after = generate(engine, asked)
    assert all(result.weight_versions == [(1, 0)] for result in after)
    for request, old, new in zip(asked, before, after, strict=True):
        assert old.response_ids != new.response_ids
        assert_log_probs_match(kit, request, new)


def test_what_differs_from_the_trainers_weights_is_named(holder):
    """Weights: checksums name each tensor that differs from the trainer's."""
    engine = holder.build()

    def compare() -> list[str]:
        return asyncio.run(engine.check_weights(holder.trainer.named_parameters()))

    assert compare() == []
    flipped = holder.trainer.model.layers[1].self_attn.k_proj.weight.data
    kept = flipped[3, 5].clone()
    flipped[3, 5] *= -1
    (difference,) = compare()
    assert difference.startswith("model.layers.1.self_attn.k_proj.weight differs")
    flipped[3, 5] = kept
    holder.trainer.model.layers[0].mlp.down_proj.weight.data.add_(1)  # the engine's is stale
    (difference,) = compare()
    assert difference.startswith("model.layers.0.mlp.down_proj.weight differs")
    asyncio.run(engine.update_weights(holder.trainer.named_parameters(), version=1))
    seconds = dict(engine.update_seconds)
    assert seconds["gather"] > 0
    assert compare() == []
    assert engine.update_seconds == seconds  # comparing is no update


def test_names_that_are_not_the_engines_are_refused_and_nothing_is_generated_from_a_mixture(holder):
    """Weights: unknown, missing and misshapen tensors are named, and nothing is drawn from a mixture."""
    engine = holder.build()
    weights = dict(holder.trainer.named_parameters())
    unknown = {**weights, "model.layers.9.wrong": torch.zeros(3)}
    missing = {name: tensor for name, tensor in weights.items() if name != "model.layers.0.mlp.up_proj.weight"}
    misshapen = {**weights, "model.norm.weight": torch.zeros(3, device=holder.trainer.device)}
    for wrong, says in (
        (unknown, "model.layers.9.wrong"),
        (missing, "model.layers.0.mlp.up_proj.weight"),
        (misshapen, "model.norm.weight"),
    ):
        with pytest.raises(UserError, match=says):
            asyncio.run(engine.update_weights(wrong.items(), version=1))
        with pytest.raises(IllegalState, match="did not end well"):
            generate(engine, [one()])
        asyncio.run(engine.update_weights(weights.items(), version=2))
        (result,) = generate(engine, [one()])
        assert_log_probs_match(holder, one(), result)


def test_an_engine_without_weights_generates_nothing(holder):
    """Weights: nothing is drawn before the first update."""
    engine = holder.build(weights=False)
    with pytest.raises(IllegalState, match="update_weights first"):
        generate(engine, [one()])


def test_sleep_and_wake_in_any_wrong_order_are_refused_and_in_the_right_one_serve(kit):
    """Sleep: weights and cache are given back and taken again; wrong orders are refused."""
    engine = kit.build()
    if engine.capabilities.sleep != {"weights", "kv_cache"}:
        pytest.skip("does not sleep")

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate([one(id="busy", max_new_tokens=100)]))
        await kit.generate_some()
        with pytest.raises(IllegalState, match="being generated"):
            await engine.sleep(["kv_cache"])
        await call
        with pytest.raises(IllegalState, match="already awake"):
            await engine.wake(["weights"])
        await engine.sleep(["kv_cache"])
        with pytest.raises(IllegalState, match="kv_cache asleep"):
            await engine.generate([one()])
        await engine.sleep(["weights"])
        with pytest.raises(IllegalState, match="already asleep"):
            await engine.sleep(["weights"])
        with pytest.raises(IllegalState, match="weights asleep"):
            await engine.update_weights(kit.trainer.named_parameters(), version=1)
        await engine.wake(["weights"])
        await engine.wake(["kv_cache"])
        with pytest.raises(IllegalState, match="update_weights first"):
            await engine.generate([one()])
        await engine.update_weights(kit.trainer.named_parameters(), version=1)
        return await engine.generate([one()])

    (result,) = asyncio.run(run())
    assert_log_probs_match(kit, one(), result)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_weights_are_not_updated_while_requests_are_generated(kit):
    """Weights: an update while requests are drawn is refused."""
    engine = kit.build()

    async def run() -> Result:
        call = asyncio.create_task(engine.generate([one()]))
        await asyncio.sleep(0)
        with pytest.raises(IllegalState, match="pause or abort"):
            await engine.update_weights(kit.trainer.named_parameters(), version=1)
        return (await call)[0]

    assert asyncio.run(run()).weight_versions == [(0, 0)]


def test_pausing_twice_and_resuming_what_runs_are_illegal(kit):
    """Pause: pausing twice, and resuming what runs, are refused."""
    engine = kit.build()

    async def run() -> None:
        with pytest.raises(IllegalState, match="not paused"):
            await engine.resume()
        await engine.pause()
        with pytest.raises(IllegalState, match="already paused"):
            await engine.pause()
        await engine.resume()

    asyncio.run(run())


def test_an_id_in_flight_is_refused(kit):
    """Refused: a second request with an id in flight."""
    engine = kit.build()

    async def run() -> None:
        with pytest.raises(IllegalState, match="'same'"):
            await engine.generate([one(id="same"), one(id="same")])
        call = asyncio.create_task(engine.generate([one(id="same", max_new_tokens=120)]))
        await asyncio.sleep(0)
        with pytest.raises(IllegalState, match="'same'"):
            await engine.generate([one(id="other"), one(id="same")])
        await call
        await engine.generate([one(id="same"), one(id="other")])

    asyncio.run(run())


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (one(prompt=[5] * 150), "context length of 160"),
        (one(prompt=[]), "empty"),
        (one(prompt=[5, 100]), "vocabulary"),
        (one(prompt=[-1, 5]), "vocabulary"),
        (one(max_new_tokens=0), "max_new_tokens=0"),
        (one(min_new_tokens=25), "min_new_tokens=25"),
        (one(temperature=-0.5), "temperature=-0.5"),
        (one(top_p=0.0), "top_p=0.0"),
        (one(top_p=1.2), "top_p=1.2"),
        (one(top_k=0), "top_k=0"),
        (one(min_p=1.0), "min_p=1.0"),
        (one(stop=("",)), "stop string"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_that_cannot_be_served_is_named_and_nothing_of_its_call_runs(kit, request_, says):
    """Refused: a request that cannot be served is named with what is wrong, and nothing of its call runs."""
    engine = kit.build()
    with pytest.raises(UserError, match="request 'one'") as caught:
        generate(engine, [one(id="fine"), request_])
    assert says in str(caught.value)
    assert len(generate(engine, [one(id="fine")])) == 1


def test_what_an_engine_declares_it_cannot_do_it_refuses(kit):
    """Refused: what the engine declares that it cannot do."""
    engine = kit.build()
    if not engine.capabilities.images:
        with pytest.raises(Unsupported, match="images"):
            generate(engine, [Request("picture", [5], SamplingParams(), images=("a.png",))])
    for tag in {"weights", "kv_cache"} - engine.capabilities.sleep:
        with pytest.raises(Unsupported):
            asyncio.run(engine.sleep([tag]))
        with pytest.raises(Unsupported):
            asyncio.run(engine.wake([tag]))


def test_stop_strings_without_a_tokenizer_are_refused(kit):
    """Refused: stop strings, where there is no tokenizer."""
    engine = kit.build(tokenizer=False)
    if engine.capabilities.stop_strings:
        pytest.skip("needs no tokenizer for stop strings")
    with pytest.raises(Unsupported, match="stop strings"):
        generate(engine, [one(stop=("x",))])


# --- the end ---------------------------------------------------------------------------------------------------------


def test_a_healthy_engine_says_so_and_a_closed_one_does_not(kit):
    """Closing: a health check tells an engine that serves from one that is closed."""
    engine = kit.build()
    asyncio.run(engine.health())
    asyncio.run(engine.close())
    with pytest.raises(IllegalState, match="closed"):
        asyncio.run(engine.health())


def test_closing_aborts_what_is_in_flight_and_closing_again_is_no_error(kit):
    """Closing: aborts what is in flight; closing again is no error."""
    engine = kit.build()

    async def run() -> Result:
        call = asyncio.create_task(engine.generate([one(max_new_tokens=100)]))
        await kit.generate_some()
        await engine.close()
        await engine.close()
        return (await call)[0]

    result = asyncio.run(run())
    assert result.finish_reason == "abort"
    assert 0 < len(result.response_ids) < 100


def test_a_closed_engine_takes_no_orders(kit):
    """Closing: a closed engine takes no orders."""
    engine = kit.build()
    asyncio.run(engine.close())
    for order in (
        lambda: engine.generate([one()]),
        engine.pause,
        engine.resume,
        lambda: engine.update_weights([], version=1),
    ):
        with pytest.raises(IllegalState, match="closed"):
            asyncio.run(order())
    asyncio.run(engine.abort())
