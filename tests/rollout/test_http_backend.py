"""A server elsewhere as an engine: what goes over HTTP, and what comes of a server that misbehaves."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import httpx
import pytest
import torch
from fake_sglang import FakeSGLang, hang, reset, send, token_at
from safetensors.torch import load_file

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied
from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import IllegalState, PromptWindow, Request, Result, SamplingParams, Unsupported
from verl.rollout.engines.sglang.http_backend import SGLangServer, Times
from verl.rollout.router.router import Replica, Router
from verl.rollout.weights.disk import WeightFolder

EOS = 1
QUICK = Times(probe_every=0.05, probe_timeout=5.0, dead_after=10.0, abort_every=0.01, retry_after=0.01, idle=1.0)
WEIGHTS = {
    "model.embed_tokens.weight": torch.arange(24, dtype=torch.float32).view(6, 4),
    "model.norm.weight": torch.tensor([1.5, 2.5, 3.5]),
    "lm_head.weight": torch.full((6, 4), 0.25),
}


@pytest.fixture
def start() -> Iterator[Callable[..., FakeSGLang]]:
    servers: list[FakeSGLang] = []

    def one(**options) -> FakeSGLang:
        servers.append(FakeSGLang(**options))
        return servers[-1]

    yield one
    for server in servers:
        server.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., ClientEngine]]:
    backends: list[SGLangServer] = []

    def one(server: FakeSGLang, no_weights: str | None = None, **options) -> ClientEngine:
        settings = {"end_tokens": [EOS], "max_model_len": 400, "vocab_size": 100, "times": QUICK, **options}
        backends.append(SGLangServer(server.url, **settings))
        return ClientEngine(
            backends[-1], Letters(), eos_token_ids=[EOS], max_model_len=400, vocab_size=100, no_weights=no_weights
        )

    yield one
    for backend in backends:
        backend.close()


class Letters:
    def decode(self, ids: list[int], **_) -> str:
        return "".join(chr(0x4E00 + id) for id in ids)


def request(id: int | str = 0, prompt=(5, 6, 7), tokens: int = 12, **sampling) -> Request:
    return Request(str(id), prompt, SamplingParams(max_new_tokens=tokens, **sampling))


def generate(engine, *requests: Request) -> list[Result]:
    return asyncio.run(asyncio.wait_for(engine.generate(requests), 20))


def response(place: int, tokens: int) -> list[int]:
    return [token_at(place + index) for index in range(tokens)]


def check(result: Result, asked: Request) -> None:
    assert result.response_ids == response(len(asked.prompt_ids), asked.sampling.max_new_tokens)
    assert result.log_probs == [-token / 100 for token in result.response_ids]
    assert result.finish_reason == "length"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "waited 10 s"
        time.sleep(0.005)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_tokens_and_log_probs_come_back_in_order(start, connect):
    server = start()
    asked = [request(index, prompt=range(2, 4 + index), tokens=5 + index) for index in range(20)]
    for result, request_ in zip(generate(connect(server), *asked), asked, strict=True):
        check(result, request_)
    body = server.bodies("/generate")[0]
    assert body["return_logprob"] is True
    assert body["stream"] is False
    assert body["sampling_params"]["stop_token_ids"] == [EOS]


def test_ids_are_no_other_clients_and_none_begins_another(start, connect):
    server = start()
    for engine in (connect(server), connect(server)):
        generate(engine, *(request(index) for index in range(12)))
    rids = [body["rid"] for body in server.bodies("/generate")]
    assert len(set(rids)) == 24
    assert not any(one != other and other.startswith(one) for one in rids for other in rids)


def test_the_servers_stop_token_ends_a_response(start, connect):
    stop = token_at(6)
    (result,) = generate(connect(start()), request(stop_token_ids=(stop,)))
    assert result.response_ids == response(3, 4)
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("incremental", [False, True])
def test_a_stop_string_is_watched_in_a_stream(start, connect, incremental):
    server = start(step=0.001, incremental_streaming_output=incremental)
    engine = connect(server)
    if incremental:
        output = server._output
        sent: dict[str, int] = {}

        def disjoint(body, entries, finish):
            before = sent.get(body["rid"], 0)
            sent[body["rid"]] = len(entries)
            return output(body, entries, finish) | {
                "meta_info": output(body, entries, finish)["meta_info"] | {"output_token_logprobs": entries[before:]}
            }

        server._output = disjoint
    stop = Letters().decode(response(3 + 39, 2))
    (result,) = generate(engine, request(tokens=300, stop=(stop,)))
    assert result.response_ids == response(3, 41)
    assert result.finish_reason == "stop"
    until(lambda: not server.running)  # it was told that nobody wants the rest
    assert len(server.bodies("/generate")) == 1


def test_a_stop_at_a_token_that_is_not_the_models_is_an_error(start, connect):
    server = start()
    server.stops_at = token_at(5)
    with pytest.raises(UserError, match="does it serve the model"):
        generate(connect(server), request())


def test_a_log_prob_that_is_not_a_number_is_an_error(start, connect):
    server = start()
    output = server._output
    server._output = lambda *args: output(args[0], [[None, 5, None]], args[2])
    with pytest.raises(UserError, match="not a number"):
        generate(connect(server), request(tokens=1))


@pytest.mark.parametrize(
    ("facts", "window"),
    [
        ({"chunked_prefill_size": 2048, "max_running_requests": 64}, PromptWindow(6144, 64)),
        ({"chunked_prefill_size": -1, "max_running_requests": None}, PromptWindow(3 * 8192, 1024)),
        ({}, PromptWindow(3 * 8192, 1024)),
    ],
)
def test_the_prompts_that_a_server_keeps_are_known_from_what_it_says(start, connect, facts, window):
    server = start()
    server.facts |= facts
    assert connect(server).capabilities.window == window


def test_abort_gives_back_what_was_generated_and_leaves_the_others(start, connect):
    server = start(step=0.01)
    engine = connect(server)

    async def run() -> list[list[Result]]:
        calls = [asyncio.create_task(engine.generate([request(id, tokens=80)])) for id in ("one", "other")]
        await asyncio.sleep(0.1)
        await engine.abort(["one"])
        return await asyncio.gather(*calls)

    (one,), (other,) = asyncio.run(run())
    assert one.finish_reason == "abort"
    assert one.response_ids == response(3, len(one.response_ids))
    assert 0 < len(one.response_ids) < 80
    check(other, request(tokens=80))


def test_a_pause_keeps_what_was_generated(start, connect):
    server = start(step=0.01)
    engine = connect(server)
    asked = [request(index, tokens=60) for index in range(5)]

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate(asked))
        await asyncio.sleep(0.1)
        await engine.pause()
        assert not server.running
        await asyncio.sleep(0.02)
        assert not call.done()
        await engine.resume()
        return await call

    for result, request_ in zip(asyncio.run(run()), asked, strict=True):
        check(result, request_)
    assert {"abort_all": True} in server.bodies("/abort_request")


def test_no_more_connections_are_open_than_allowed_and_what_waits_can_be_aborted(start, connect):
    server = start(step=0.005)
    engine = connect(server)
    engine.backend._requests._room = asyncio.Semaphore(3)

    async def run() -> list[Result]:
        call = asyncio.create_task(engine.generate([request(index, tokens=100) for index in range(10)]))
        await asyncio.sleep(0.1)
        await engine.abort()
        return await call

    results = asyncio.run(run())
    assert server.most_running == 3
    assert {result.finish_reason for result in results} == {"abort"}
    assert sum(bool(result.response_ids) for result in results) == 3
    check(generate(engine, request())[0], request())


@pytest.mark.parametrize("turns", range(4))
def test_a_call_that_is_cancelled_at_once_leaves_nothing_behind(start, connect, turns):
    server = start(step=0.002)
    engine = connect(server)

    async def run() -> None:
        call = asyncio.create_task(engine.generate([request("leaving", tokens=300)]))
        for _ in range(turns):
            await asyncio.sleep(0)
        call.cancel()
        await asyncio.wait([call])
        await asyncio.wait_for(engine.abort(), 5)
        await asyncio.wait_for(engine.pause(), 5)
        await engine.resume()

    asyncio.run(run())
    until(lambda: not engine.backend._requests._under_way and not server.running)


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_key_is_sent_and_a_wrong_one_is_named_and_not_shown(start, connect):
    server = start(key="right-secret")
    check(generate(connect(server, key="right-secret"), request())[0], request())
    for key, says in ((None, "wants a key"), ("wrong-secret", "refuses the key")):
        with pytest.raises(UserError, match=says) as caught:
            connect(server, key=key)
        assert "server_api_key_env" in str(caught.value)
        assert "401" in str(caught.value)
        assert "secret" not in str(caught.value)


def test_a_server_that_obeys_everybody_is_refused_where_it_should_have_a_key(start, connect):
    with pytest.raises(UserError, match=r"has no key.*--api-key") as caught:
        connect(start(), key="a-secret")
    assert "secret" not in str(caught.value)


def test_an_error_of_the_server_is_passed_on_with_url_and_status(start, connect):
    server = start()
    engine = connect(server)
    server.say["/generate"] = 500
    with pytest.raises(UserError, match=rf"{server.url}/generate answered 500: as it was told"):
        generate(engine, request())
    del server.say["/generate"]
    check(generate(engine, request())[0], request())


def test_a_request_that_is_refused_in_a_stream_is_an_error(start, connect):
    server = start()
    engine = connect(server)

    async def refuse(writer) -> None:
        await send(writer, 200, 'data: {"error": {"message": "too long", "code": 400}}\n\ndata: [DONE]\n\n')

    server.say["/generate"] = refuse
    with pytest.raises(UserError, match="did not take the request: too long"):
        generate(engine, request(stop=("x",)))


def test_what_is_not_an_sglang_server_is_not_taken_for_one(start, connect):
    server = start()
    server.say["/server_info"] = lambda writer: send(writer, 200, "<html>hello</html>")
    with pytest.raises(UserError, match="is the URL right"):
        connect(server)


def test_a_server_that_cannot_be_reached_is_named(start, connect):
    server = start()
    server.die()
    with pytest.raises(EngineDied, match=rf"{server.url}.* cannot be reached"):
        connect(server)
    server.start()


@pytest.mark.parametrize("stop", [(), ("never",)], ids=["whole", "streamed"])
def test_a_connection_that_is_slow_to_come_about_is_no_server_that_is_gone(start, connect, monkeypatch, stop):
    server = start()
    engine = connect(server)
    send_on, late = httpx.AsyncHTTPTransport.handle_async_request, []

    async def sometimes_late(transport, request: httpx.Request) -> httpx.Response:
        if request.url.path == "/generate" and len(late) < 2:
            late.append(request)
            raise httpx.ConnectTimeout("", request=request)
        return await send_on(transport, request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", sometimes_late)
    (result,) = generate(engine, request(stop=stop))
    assert len(late) == 2
    assert result.finish_reason == "length"


def test_a_server_that_takes_no_connection_is_gone_in_the_end(start, connect, monkeypatch):
    server = start()
    engine = connect(server)

    async def late(transport, request: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("", request=request)

    monkeypatch.setattr(httpx.AsyncHTTPTransport, "handle_async_request", late)
    with pytest.raises(EngineDied, match=f"{server.url}.* took no connection within 10 s"):
        generate(engine, request())


def test_a_server_whose_context_is_too_short_is_refused(start, connect):
    with pytest.raises(UserError, match="--context-length 408"):
        connect(start(max_req_input_len=300))


@pytest.mark.parametrize("stop", [(), ("never",)], ids=["whole", "streamed"])
def test_a_server_that_dies_in_the_middle_ends_all_its_requests(start, connect, stop):
    server = start(step=0.01)
    engine = connect(server)
    threading.Timer(0.15, server.die).start()
    began = time.monotonic()
    with pytest.raises(EngineDied, match=server.url):
        generate(engine, *(request(index, tokens=300, stop=stop) for index in range(5)))
    assert time.monotonic() - began < 3
    with pytest.raises(EngineDied):
        generate(engine, request())
    with pytest.raises(EngineDied):
        asyncio.run(engine.health())


def test_a_server_that_hangs_is_given_up_after_a_while(start, connect):
    server = start()
    engine = connect(server, times=replace(QUICK, probe_timeout=0.2, dead_after=0.4))
    server.say |= {"/generate": hang, "/server_info": hang}
    began = time.monotonic()
    with pytest.raises(EngineDied, match="no sign of life"):
        generate(engine, request())
    assert 0.4 < time.monotonic() - began < 5


def test_a_slow_server_that_answers_probes_is_waited_for(start, connect):
    server = start(step=0.05)
    engine = connect(server)
    before = len(server.bodies("/server_info"))
    check(generate(engine, request(tokens=20))[0], request(tokens=20))  # a second, without a word in between
    assert len(server.bodies("/server_info")) > before + 5


@pytest.mark.parametrize("stop", [(), ("never",)], ids=["whole", "streamed"])
def test_a_connection_that_breaks_is_no_death(start, connect, stop):
    server = start(step=0.002)
    engine = connect(server)
    broken: list[None] = []

    async def break_once(writer) -> None:
        if broken:
            del server.say["/generate"]
        broken.append(None)
        await reset(writer)

    server.say["/generate"] = break_once
    check(generate(engine, request(tokens=70, stop=stop))[0], request(tokens=70))
    assert len(broken) == 2
    rids = [body["rid"] for body in server.bodies("/generate")]
    assert [rid[-2:] for rid in rids] == ["-1", "-2", "-3"]
    assert [body["rid"] for body in server.bodies("/abort_request")] == rids[:2]


def test_a_stream_that_breaks_goes_on_from_where_it_was(start, connect):
    server = start(step=0.002)
    engine = connect(server)

    def cut() -> None:
        until(lambda: any("-1" in rid for rid in server.running))
        time.sleep(0.15)
        server.on_loop(abort_writers())

    async def abort_writers() -> None:
        for writer in list(server._writers):
            writer.transport.abort()

    thread = threading.Thread(target=cut)
    thread.start()
    check(generate(engine, request(tokens=150, stop=("never",)))[0], request(tokens=150))
    thread.join()
    first, second = server.bodies("/generate")
    assert second["input_ids"][:3] == first["input_ids"]
    assert len(second["input_ids"]) > 3
    assert second["sampling_params"]["max_new_tokens"] == 153 - len(second["input_ids"])


def test_an_overloaded_server_is_asked_again(start, connect):
    server = start()
    engine = connect(server)
    times: list[None] = []

    async def twice(writer) -> None:
        times.append(None)
        if len(times) == 2:
            del server.say["/generate"]
        await send(writer, 503, {"message": "full"})

    server.say["/generate"] = twice
    check(generate(engine, request())[0], request())


# --- weights ---------------------------------------------------------------------------------------------------------


def update(engine, weights=WEIGHTS, version: int = 1) -> None:
    asyncio.run(engine.update_weights(iter(weights.items()), version))


@pytest.mark.parametrize("ranks", [1, 2])
def test_tensors_go_by_value_in_buckets(start, connect, ranks):
    server = start(tp_size=ranks)
    engine = connect(server, bucket_bytes=100, no_weights="none yet")
    with pytest.raises(IllegalState, match="none yet"):
        generate(engine, request())
    view = torch.arange(1000, dtype=torch.bfloat16)[100:104]
    update(engine, {**WEIGHTS, "a.view": view, "a.parameter": torch.nn.Parameter(torch.ones(2))})
    assert server.parameters.keys() == {*WEIGHTS, "a.view", "a.parameter"}
    for name, tensor in WEIGHTS.items():
        assert torch.equal(server.parameters[name], tensor)
    assert torch.equal(server.parameters["a.view"], view)
    bodies = server.bodies("/update_weights_from_tensor")
    assert len(bodies) == 4
    assert max(len(body["serialized_named_tensors"][0]) for body in bodies) < 3000  # a view takes its own bytes only
    assert generate(engine, request())[0].weight_versions == [(1, 0)]


def test_a_type_to_send_in_is_honoured(start, connect, tmp_path):
    for folder in (None, WeightFolder(tmp_path / "weights", tmp_path, torch.bfloat16)):
        server = start()
        update(connect(server, dtype=torch.bfloat16, folder=folder), {**WEIGHTS, "count": torch.tensor([3])})
        assert server.parameters["model.norm.weight"].dtype == torch.bfloat16
        assert server.parameters["count"].dtype == torch.int64


def test_a_folder_has_all_of_a_model_and_goes_when_it_is_old(start, connect, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "model.safetensors.index.json").write_text("the base model's")
    server = start()
    engine = connect(server, folder=WeightFolder(tmp_path / "weights", tmp_path / "model"))
    seen: list[list[str]] = []
    take = server.update_weights_from_disk

    def look(body):
        (run,) = (tmp_path / "weights").iterdir()
        (version,) = run.iterdir()
        assert str(version) == body["model_path"]
        seen.append(sorted(path.name for path in version.iterdir()))
        assert load_file(version / "model-00001.safetensors").keys() == WEIGHTS.keys()
        return take(body)

    server.update_weights_from_disk = look
    for version in (1, 2):
        update(engine, version=version)
    assert seen == [["config.json", "model-00001.safetensors", "model.safetensors.index.json"]] * 2
    assert torch.equal(server.parameters["model.norm.weight"], WEIGHTS["model.norm.weight"])
    assert list(next((tmp_path / "weights").iterdir()).iterdir()) == []


def test_a_large_model_is_written_in_shards_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr("verl.rollout.weights.disk.SHARD_BYTES", 100)
    folder = WeightFolder(tmp_path, tmp_path / "nothing")
    saved = folder.write(iter(WEIGHTS.items()), 3)
    assert len(list(saved.folder.glob("*.safetensors"))) == 3
    for _ in range(2):
        read = dict(saved)
        assert read.keys() == WEIGHTS.keys()
        assert all(torch.equal(read[name], WEIGHTS[name]) for name in WEIGHTS)
    assert {name: part.shape[0] for name, part in saved.beginnings(2, 20)} == {"model.norm.weight": 2}
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="server_weights_dir"):
        WeightFolder(tmp_path / "file", tmp_path).write(iter(WEIGHTS.items()), 1)


def test_a_refused_update_leaves_nothing_to_generate_from(start, connect):
    server = start()
    engine = connect(server)
    server.say["/update_weights_from_tensor"] = lambda writer: send(writer, 400, {"success": False, "message": "no"})
    with pytest.raises(UserError, match=r"refused.*answered 400: no"):
        update(engine)
    with pytest.raises(IllegalState, match="did not end well"):
        generate(engine, request())


def test_an_update_that_says_success_and_did_nothing_is_found_out(start, connect):
    server = start()
    engine = connect(server)
    update(engine)
    server.known = {"lm_head.weight", "model.embed_tokens.weight"}
    with pytest.raises(UserError, match=r"model\.norm\.weight differs by up to 1"):
        update(engine, {name: tensor + 1 for name, tensor in WEIGHTS.items()}, version=2)
    server.parameters.clear()
    with pytest.raises(UserError, match=r"model\.norm\.weight is not held by the server"):
        update(engine, version=3)


def test_a_server_that_gives_no_parameters_is_believed(start, connect):
    server = start()
    server.readable = False
    update(connect(server))


def test_check_weights_finds_a_parameter_that_no_tensor_fills(start, connect):
    server = start()
    server.readable = False
    engine = connect(server)
    update(engine)
    assert asyncio.run(engine.check_weights(iter(WEIGHTS.items()))) == []
    check(generate(engine, request())[0], request())
    server.known = WEIGHTS.keys() - {"model.norm.weight"}
    (difference,) = asyncio.run(engine.check_weights(iter(WEIGHTS.items())))
    assert "log-probs of a fixed text differ" in difference


def test_check_weights_finds_a_server_that_held_others(start, connect):
    server = start()
    server.readable = False
    engine = connect(server)
    update(engine)
    changed = {**WEIGHTS, "model.norm.weight": WEIGHTS["model.norm.weight"] + 1}
    assert asyncio.run(engine.check_weights(iter(changed.items()))) != []


@pytest.mark.parametrize("version", ["default", "another-runs-7"])
def test_a_server_with_other_weights_than_ours_is_dead_to_us(start, connect, version):
    server = start()
    engine = connect(server)
    update(engine)
    server.weight_version = version
    with pytest.raises(EngineDied, match=f"has weights '{version}'"):
        generate(engine, request())


def test_a_server_that_dies_of_an_update_is_told_as_such(start, connect):
    server = start()
    engine = connect(server)
    server.say["/update_weights_from_tensor"] = reset
    with pytest.raises(EngineDied, match="during a weight update"):
        update(engine)
    with pytest.raises(EngineDied):
        asyncio.run(engine.health())


# --- memory and health -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asleep", [False, True])
def test_a_sign_of_life_costs_no_token(start, connect, asleep):
    """As /health would: whoever then orders the server to load weights, or had it put to sleep, would end it."""
    server = start(step=0.05, enable_memory_saver=True)
    engine = connect(server)
    generate(engine, request(tokens=10))
    if asleep:
        asyncio.run(engine.sleep(["kv_cache"]))
    before = len(server.bodies("/server_info"))
    asyncio.run(engine.health())
    assert len(server.bodies("/server_info")) == before + 1
    assert server.bodies("/health") == []


def test_a_server_sleeps_only_if_it_was_started_for_that(start, connect):
    with pytest.raises(Unsupported):
        asyncio.run(connect(start()).sleep(["kv_cache"]))
    server = start(enable_memory_saver=True)
    engine = connect(server)
    asyncio.run(engine.sleep(["kv_cache"]))
    asyncio.run(engine.wake(["kv_cache"]))
    assert server.bodies("/release_memory_occupation") == [{"tags": ["kv_cache"]}]


def test_weights_are_checked_with_the_cache_asleep_which_it_is_again_afterwards(start, connect):
    server = start(enable_memory_saver=True)
    engine = connect(server)
    update(engine)
    asyncio.run(engine.sleep(["kv_cache"]))
    assert asyncio.run(engine.check_weights(iter(WEIGHTS.items()))) == []
    assert server.asleep == {"kv_cache"}
    asyncio.run(engine.wake(["kv_cache"]))
    check(generate(engine, request())[0], request())


def test_a_server_is_left_awake_for_the_next_run(start, connect):
    server = start(enable_memory_saver=True)
    for _ in range(2):
        engine = connect(server)
        asyncio.run(engine.sleep(["weights", "kv_cache"]))
        asyncio.run(engine.close())
        assert server.asleep == set()


def test_the_cache_is_dropped_again_and_again_until_the_server_is_idle(start, connect):
    server = start()
    engine = connect(server)
    server.say["/flush_cache"] = 400
    threading.Timer(0.1, lambda: server.say.pop("/flush_cache")).start()
    update(engine)
    assert len(server.bodies("/flush_cache")) > 2
    server.say["/flush_cache"] = 400
    with pytest.raises(UserError, match="flush_cache answered 400"):
        update(engine)


# --- several servers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["tensors", "disk"])
def test_one_of_two_servers_dies_and_comes_back(start, connect, tmp_path, by):
    servers = [start(step=0.004), start(step=0.004)]
    folder = WeightFolder(tmp_path / "weights", tmp_path) if by == "disk" else None
    of_name = {f"s{index}": server for index, server in enumerate(servers)}
    notes: list[str] = []
    router = Router(
        [Replica(name, connect(server, folder=folder, no_weights="none")) for name, server in of_name.items()],
        revive=lambda name: connect(of_name[name], folder=folder, no_weights="none"),
        save=folder.write if folder else None,
        forget=folder.forget if folder else lambda saved: None,
        note=notes.append,
        retry_every=0.02,
    )
    update(router)
    asked = [request(index, prompt=[5, 2 + index], tokens=60) for index in range(20)]
    threading.Thread(target=lambda: (until(lambda: len(servers[0].running) > 3), servers[0].die())).start()
    for result, request_ in zip(generate(router, *asked), asked, strict=True):
        check(result, request_)
    assert router.members[0].state == "dead"
    servers[0].start()
    until(lambda: router.members[0].state == ("used" if by == "disk" else "unsynced"))
    before = len(servers[0].bodies("/generate"))
    generate(router, *asked)
    assert (len(servers[0].bodies("/generate")) > before) == (by == "disk")
    update(router, version=2)
    assert asyncio.run(router.check_weights(iter(WEIGHTS.items()))) == []
    before = len(servers[0].bodies("/generate"))
    for result in generate(router, *asked):
        assert result.weight_versions == [(2, 0)]
    assert len(servers[0].bodies("/generate")) > before
    asyncio.run(router.close())
    assert any("taken out" in note for note in notes)
    assert any("is back" in note for note in notes)
