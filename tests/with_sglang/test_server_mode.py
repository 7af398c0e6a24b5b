"""``rollout.mode=server`` with two real SGLang servers on the CPU: weights both ways, a wrong key, death and return."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from live_server import Server
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.config.loading.load import load
from verl.config.sections.models import Config
from verl.errors import UserError
from verl.rollout.contract.base import IllegalState, Request, Result, SamplingParams
from verl.rollout.engines.sglang.arguments import SGLANG
from verl.rollout.engines.sglang.http_requests import Times
from verl.rollout.engines.sglang.server_replicas import build_server_rollout
from verl.rollout.router.router import Router

pytestmark = pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed (make sglang-cpu)")

KEY_VARIABLE = "VERL_TEST_SERVER_KEY"
EOS, CONTEXT, VOCABULARY = 1, 400, 100
TOLERANCE = 5e-5  # float32


def tiny_model(seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT + 8,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("server mode") / "model"
    tiny_model(seed=0).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def servers(model) -> Iterator[list[Server]]:
    key = secrets.token_hex(8)
    os.environ[KEY_VARIABLE] = key
    started = [Server(model, key, model.parent / f"server {number}.log") for number in range(2)]
    try:
        for server in started:
            server.wait()
        yield started
    finally:
        for server in started:
            server.kill()
        del os.environ[KEY_VARIABLE]


@pytest.fixture
def connect(servers, model, tmp_path) -> Iterator[Callable[..., Router]]:
    routers: list[Router] = []
    for server in servers:
        server.assert_running()

    def one(by: str = "tensors", note: Callable[[str], None] = print, retry_every: float = 10.0) -> Router:
        config = config_of(
            "actor_rollout_ref.rollout.mode=server",
            f"actor_rollout_ref.rollout.server_urls=[{','.join(server.url for server in servers)}]",
            f"actor_rollout_ref.rollout.server_api_key_env={KEY_VARIABLE}",
            f"actor_rollout_ref.rollout.server_weight_update={by}",
            f"actor_rollout_ref.rollout.server_weights_dir={tmp_path / 'weights'}",
            f"actor_rollout_ref.model.path='{model}'",
        )
        times = Times(probe_every=1.0, probe_timeout=30.0, dead_after=60.0)
        policy = config.actor_rollout_ref
        router = build_server_rollout(
            policy.rollout,
            Path(policy.model.path),
            None,
            [EOS],
            CONTEXT,
            VOCABULARY,
            dtype=None,
            bucket_bytes=50_000,
            weights_dir=policy.rollout.server_weights_dir if by == "disk" else None,
            note=note,
            times=times,
        )
        router._pool.retry_every = retry_every
        routers.append(router)
        return router

    yield one
    for router in routers:
        asyncio.run(router.close())


def config_of(*overrides: str) -> Config:
    loaded = load(["actor_rollout_ref.rollout.name=sglang", *overrides])
    assert loaded.config is not None, loaded.problems
    return loaded.config


def requests(count: int, tokens: int = 24, **sampling) -> list[Request]:
    settings = SamplingParams(max_new_tokens=tokens, **sampling)
    return [Request(str(index), [5, 6, 2 + index % 90], settings) for index in range(count)]


def generate(router: Router, asked: list[Request]) -> list[Result]:
    return asyncio.run(router.generate(asked))


def update(router: Router, trainer: Qwen2ForCausalLM, version: int) -> None:
    asyncio.run(router.update_weights(trainer.named_parameters(), version))


def differences(router: Router, trainer: Qwen2ForCausalLM) -> list[str]:
    return asyncio.run(router.check_weights(trainer.named_parameters()))


@torch.no_grad()
def check(trainer: Qwen2ForCausalLM, asked: list[Request], results: list[Result]) -> None:
    """The log-probs are the trainer's."""
    assert [result.id for result in results] == [request.id for request in asked]
    for request, result in zip(asked, results, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *result.response_ids]])
        logits = trainer(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor(result.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("by", ["tensors", "disk"])
def test_both_servers_generate_from_the_trainers_weights(connect, by):
    router = connect(by)
    with pytest.raises(IllegalState, match="has not been given the actor's weights"):
        generate(router, requests(1))
    for seed in (1, 2):
        trainer = tiny_model(seed)
        update(router, trainer, version=seed)
        asked = [*requests(16, ignore_eos=True), Request("stops", [7], SamplingParams(max_new_tokens=200))]
        results = generate(router, asked)
        check(trainer, asked, results)
        assert all(result.weight_versions == [(seed, 0)] for result in results)
        assert all(len(result.response_ids) == 24 for result in results[:16])
    assert differences(router, trainer) == []


def test_weights_that_do_not_fill_the_model_are_found_out_on_each_server(connect):
    router, trainer = connect(), tiny_model(seed=3)
    update(router, trainer, version=1)
    partial = ((name, tensor) for name, tensor in trainer.named_parameters() if "layers.1.mlp.up_proj" not in name)
    found = asyncio.run(router.check_weights(partial))
    assert len(found) == 2
    assert all("do not fill all of them" in line for line in found)


def test_a_wrong_key_is_named(connect, servers, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "not-the-key")
    with pytest.raises(UserError, match="server_api_key_env") as caught:
        connect()
    assert all(server.url in str(caught.value) for server in servers)
    assert "not-the-key" not in str(caught.value)


def test_a_pause_over_an_update_goes_on_with_the_new_weights(connect):
    router, old, new = connect(), tiny_model(seed=4), tiny_model(seed=5)
    asked = requests(12, tokens=390, ignore_eos=True)

    async def run(wait: float, version: int) -> list[Result]:
        await router.update_weights(old.named_parameters(), version)
        call = asyncio.create_task(router.generate(asked))
        await asyncio.sleep(wait)
        await router.pause()
        await router.update_weights(new.named_parameters(), version + 1)
        await router.resume()
        return await call

    for attempt in range(6):  # a busy machine may not have begun after the first wait, an idle one is done soon
        version = 1 + 2 * attempt
        results = asyncio.run(run(0.1 * 2**attempt, version))
        assert all(len(result.response_ids) == 390 for result in results)
        if any(len(result.weight_versions) == 2 for result in results):
            break
    assert any(len(result.weight_versions) == 2 for result in results)
    assert {result.weight_versions[-1][0] for result in results} == {version + 1}


def test_a_killed_servers_requests_are_answered_and_it_is_synced_before_it_is_used_again(connect, servers):
    notes: list[str] = []
    router, trainer = connect("disk", note=notes.append, retry_every=0.5), tiny_model(seed=6)
    update(router, trainer, version=1)
    asked = requests(40, tokens=100, ignore_eos=True)  # 20 of them, 8 at a time, take a server 3.6 s at least
    threading.Timer(1.0, servers[0].kill).start()
    results = generate(router, asked)
    check(trainer, asked, results)
    assert all(len(result.response_ids) == 100 for result in results)
    assert [member.state for member in router.members] == ["dead", "used"]
    assert any("is taken out; its unfinished requests are drawn again by the 1 left" in note for note in notes)

    servers[0].start()
    servers[0].wait()  # with the weights of its model's folder, which are not the trainer's
    deadline = time.monotonic() + 300
    while router.members[0].state != "used":
        assert time.monotonic() < deadline, notes
        time.sleep(0.1)
    assert router.members[0].engine.version == 1
    revived, served = router.members[0].engine, []
    send = revived.backend.generate
    revived.backend.generate = lambda sent: (served.extend(sent), send(sent))
    asked = requests(20)
    check(trainer, asked, generate(router, asked))
    assert 0 < len(served) < 20
    assert differences(router, trainer) == []
