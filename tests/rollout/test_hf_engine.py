"""What is particular to the embedded engine: how little it computes, and that it leaves the trainer's module alone."""

from __future__ import annotations

import asyncio
import gc
import itertools

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models
from torch import nn

from verl.errors import UserError
from verl.rollout.contract.base import Request, Result, SamplingParams
from verl.rollout.embedded.engine import HFEngine

SHAPE = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def make_model(arch: str = "qwen2", dtype: torch.dtype = torch.float32, **overrides) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.CONFIG_MAPPING[arch](**(SHAPE | overrides))
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def make_engine(module: transformers.PreTrainedModel, **overrides) -> HFEngine:
    return HFEngine(module, **{"eos_token_ids": [1], "max_model_len": 200, "max_num_seqs": 4, **overrides})


def ask(lengths: list[int], prompt: list[int] | None = None, **sampling) -> list[Request]:
    """Responses of these lengths to different prompts, or to this one."""
    settings = {"ignore_eos": True, **sampling}
    return [
        Request(str(index), prompt or [2 + index] * 5, SamplingParams(max_new_tokens=length, seed=index, **settings))
        for index, length in enumerate(lengths)
    ]


def generate(engine: HFEngine, requests: list[Request]) -> list[Result]:
    return asyncio.run(engine.generate(requests))


def largest_error(module: nn.Module, requests: list[Request], results: list[Result]) -> float:
    """Of the results' log-probs, against forwards of one whole text each."""
    worst = 0.0
    for request, result in zip(requests, results, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *result.response_ids]])
        with torch.no_grad():
            logits = module(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].float()
        expected = (logits / request.sampling.temperature).log_softmax(-1)
        expected = expected.gather(-1, torch.tensor(result.response_ids)[:, None])[:, 0]
        worst = max(worst, (expected - torch.tensor(result.log_probs)).abs().max().item())
    return worst


@pytest.fixture
def model() -> transformers.PreTrainedModel:
    return make_model()


@pytest.fixture
def tokens_fed(model) -> list[int]:
    """How many tokens each of the engine's forwards of ``model`` was given."""
    counts: list[int] = []

    def count(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if "past_key_values" in kwargs:
            counts.append(kwargs["input_ids"].numel())

    model.register_forward_pre_hook(count, with_kwargs=True)
    return counts


# --- how much it computes --------------------------------------------------------------------------------------------


def test_a_finished_response_gives_its_slot_to_a_waiting_one_at_once(model, tokens_fed):
    generate(make_engine(model, max_num_seqs=2), ask([10, 2, 2, 2, 2, 2]))
    assert tokens_fed == [10, 2, 6, 2, 6, 2, 6, 2, 6, 2]  # a new prompt of 5 beside the long response's token


def test_a_finished_response_costs_nothing_more(model, tokens_fed):
    generate(make_engine(model), ask([6, 1, 3, 2]))
    assert tokens_fed == [20, 3, 2, 1, 1, 1]


def test_samples_of_one_prompt_share_its_prefill(model, tokens_fed):
    requests = ask([4, 4, 4, 4], prompt=list(range(10, 40)))
    results = generate(make_engine(model), requests)
    assert tokens_fed == [30, 4, 4, 4]
    assert len({tuple(result.response_ids) for result in results}) == 4
    assert largest_error(model, requests, results) < 1e-5


def test_a_later_sample_takes_its_prompt_from_one_still_in_flight(model, tokens_fed):
    requests = ask([20, 2, 3, 4, 5], prompt=list(range(10, 40)))
    results = generate(make_engine(model, max_num_seqs=2), requests)
    assert tokens_fed == [30] + [2] * 13 + [1] * 6
    assert largest_error(model, requests, results) < 1e-5


def test_a_step_computes_no_more_prompt_tokens_than_it_may(model, tokens_fed):
    requests = ask([3, 3, 3, 3])
    results = generate(make_engine(model, max_prefill_tokens=12), requests)
    assert tokens_fed == [10, 12, 4, 2]
    assert largest_error(model, requests, results) < 1e-5
    tokens_fed.clear()
    generate(make_engine(model, max_prefill_tokens=1), ask([2, 2]))
    assert tokens_fed == [5, 6, 1]  # a longer prompt goes alone


def test_rows_that_move_up_together_keep_their_own_texts(model):
    prompts = [[5, 6], [7, 8], [9] * 3, list(range(10, 60))]
    requests = [
        Request(str(index), prompt, SamplingParams(max_new_tokens=length, seed=index, ignore_eos=True))
        for index, (prompt, length) in enumerate(zip(prompts, [3, 3, 20, 20], strict=True))
    ]
    assert largest_error(model, requests, generate(make_engine(model), requests)) < 1e-5


def test_partial_samples_of_one_prompt_go_on_from_their_own_texts_after_an_update(model):
    engine = make_engine(model, max_prefill_tokens=20)
    requests = ask([40, 40, 40], prompt=[5, 6, 7])

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(requests))
        for _ in range(12):
            await asyncio.sleep(0)
        await engine.pause()
        await engine.update_weights([], version=1)  # the same weights, but nothing cached
        await engine.resume()
        return await call

    results = asyncio.run(run())
    assert all(len(result.weight_versions) == 2 for result in results)
    assert largest_error(model, requests, results) < 1e-5


def test_the_cache_stays_within_its_bound_and_is_freed_when_idle(model):
    engine = make_engine(model, max_num_seqs=3, max_model_len=64)

    def cached() -> int:
        """Elements of live tensors shaped like a cache's: (slots, heads, length, head_dim)."""
        tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.dim() == 4]
        return sum(each.numel() for each in tensors if each.shape[1:2] == (2,))

    sizes = [cached()]
    forwards = itertools.count()
    model.register_forward_hook(lambda *_: sizes.append(cached()) if next(forwards) in (0, 30, 57) else None)
    generate(engine, ask([59, 30, 1, 20]))
    gc.collect()
    before, first, middle, last, after = *sizes, cached()
    layers, kinds, heads, head_dim = 2, 2, 2, 16
    assert before < first < middle <= last <= before + layers * kinds * 3 * heads * 64 * head_dim
    assert after == before


def test_other_tasks_run_between_steps(model):
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def run() -> None:
        counting = asyncio.create_task(count_turns())
        await make_engine(model).generate(ask([30]))
        counting.cancel()

    asyncio.run(run())
    assert turns >= 30


def test_an_event_loop_that_is_closed_in_the_middle_does_not_stop_the_engine(model):
    engine = make_engine(model)
    expected = generate(engine, ask([20, 20]))
    model.train()
    loop = asyncio.new_event_loop()

    async def leave_midway() -> asyncio.Task:
        call = asyncio.create_task(engine.generate(ask([100, 100])))
        for _ in range(10):
            await asyncio.sleep(0)
        return call

    call = loop.run_until_complete(leave_midway())
    loop.close()
    del call
    gc.collect()
    assert generate(engine, ask([20, 20])) == expected
    assert all(part.training for part in model.modules())


# --- which models ----------------------------------------------------------------------------------------------------

MODELS = {
    "llama": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 8},
    "gemma3_text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": {},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}


@pytest.mark.parametrize("arch", MODELS)
def test_log_probs_are_the_models_own_for(arch):
    module = make_model(arch, **MODELS[arch])
    requests = ask([40, 3, 20, 30, 12], temperature=1.2) + [
        Request(f"long {length}", list(range(2, 40)), SamplingParams(max_new_tokens=length, seed=length))
        for length in (12, 14)
    ]
    results = generate(make_engine(module, max_num_seqs=3), requests)
    assert largest_error(module, requests, results) < 5e-5


def test_log_probs_match_whatever_attention_the_trainer_uses():
    module = make_model(attn_implementation="eager")
    requests = ask([20, 10])
    assert largest_error(module, requests, generate(make_engine(module), requests)) < 1e-5
    assert module.config._attn_implementation == "eager"


def test_a_bfloat16_model_decodes_in_bfloat16():
    module = make_model(dtype=torch.bfloat16)
    requests = ask([20, 10, 15])
    assert largest_error(module, requests, generate(make_engine(module), requests)) < 0.1


@pytest.mark.parametrize(
    ("arch", "overrides", "reason"),
    [
        ("qwen3_next", {}, "linear_attention"),
        ("bloom", {"n_head": 4}, "AttentionInterface"),
        ("gemma2", {"head_dim": 16}, "caps its attention logits"),
    ],
)
def test_a_model_that_cannot_be_decoded_is_refused_at_once(arch, overrides, reason):
    with pytest.raises(UserError, match=reason) as caught:
        make_engine(make_model(arch, **overrides))
    assert "sglang" in str(caught.value)


# --- the trainer's module --------------------------------------------------------------------------------------------


def test_training_goes_on_as_if_nothing_had_been_generated():
    def train(rollouts: bool) -> torch.Tensor:
        module = make_model(attention_dropout=0.3)
        module.train()
        module.model.layers[0].eval()  # as a frozen layer would be
        module.gradient_checkpointing_enable({"use_reentrant": False})
        engine = make_engine(module)
        modes = [part.training for part in module.modules()]
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        torch.manual_seed(0)
        for step in range(3):
            if rollouts:
                generate(engine, ask([12, 5]))
                assert all(param.grad is None for param in module.parameters())
                assert [part.training for part in module.modules()] == modes
                asyncio.run(engine.update_weights([], version=step))
            ids = torch.arange(2, 40)[None]
            module(ids, labels=ids, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return torch.cat([param.flatten() for param in module.parameters()])

    assert torch.equal(train(rollouts=True), train(rollouts=False))


def test_dropout_and_checkpointing_of_a_training_module_do_not_reach_generation():
    module = make_model(attention_dropout=0.5)
    requests = ask([20, 30])
    expected = generate(make_engine(module), requests)
    module.train()
    module.gradient_checkpointing_enable({"use_reentrant": False})
    assert generate(make_engine(module), requests) == expected


def test_a_paused_engine_leaves_the_module_ready_for_training(model):
    engine = make_engine(model)
    model.train()

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(ask([50, 50])))
        for _ in range(10):
            await asyncio.sleep(0)
        assert not model.training
        await engine.pause()
        assert all(part.training for part in model.modules())
        ids = torch.arange(2, 20)[None]
        model(ids, labels=ids, use_cache=False).loss.backward()
        await engine.resume()
        return await call

    assert [len(result.response_ids) for result in asyncio.run(run())] == [50, 50]


def test_responses_paused_without_an_update_are_not_computed_again(model, tokens_fed):
    engine = make_engine(model)

    async def run() -> None:
        call = asyncio.create_task(engine.generate(ask([30, 30])))
        for _ in range(10):
            await asyncio.sleep(0)
        await engine.pause()
        await engine.resume()
        await call

    asyncio.run(run())
    assert tokens_fed == [10] + [2] * 29


def test_an_error_in_a_forward_reaches_every_caller_and_the_engine_goes_on(model):
    engine = make_engine(model, max_num_seqs=2)
    requests = ask([10, 10, 10])
    expected = generate(engine, requests)
    countdown = 5

    def fail(module: nn.Module, args: tuple) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            raise RuntimeError("out of memory")

    model.model.layers[1].register_forward_pre_hook(fail)

    async def run() -> list:
        return await asyncio.gather(*(engine.generate([request]) for request in requests), return_exceptions=True)

    outcomes = asyncio.run(run())
    assert [str(outcome) for outcome in outcomes] == ["out of memory"] * 3
    assert generate(engine, requests) == expected
    assert model.config._attn_implementation == "sdpa"


def test_weights_that_have_diverged_are_an_error_not_a_response(model):
    with torch.no_grad():
        model.lm_head.weight[7, 3] = torch.nan
    with pytest.raises(UserError, match="diverged"):
        generate(make_engine(model), ask([5]))


def test_a_stop_string_before_min_new_tokens_does_not_stop(model):
    letters = Tokenizer(models.WordLevel({chr(0x4E00 + token): token for token in range(100)}, unk_token=chr(0x4E00)))
    letters.decoder = decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=letters)
    engine = make_engine(model, tokenizer=tokenizer)
    free = generate(engine, ask([60]))[0].response_ids
    token = next(token for token in free if free.index(token) >= 2 and token in free[free.index(token) + 5 :])
    early, late = free.index(token), free.index(token, free.index(token) + 5)
    (stopped,) = generate(engine, ask([60], stop=(chr(0x4E00 + token),)))
    assert stopped.response_ids == free[: early + 1]
    (stopped,) = generate(engine, ask([60], stop=(chr(0x4E00 + token),), min_new_tokens=early + 5))
    assert stopped.response_ids == free[: late + 1]
