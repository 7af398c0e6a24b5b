"""A server that speaks HTTP as SGLang does, draws tokens by a rule, and misbehaves as it is told."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

VOCABULARY = 100


class Admitted(pickle.Unpickler):
    """As strict as SGLang's, or stricter."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] not in ("torch", "collections"):
            raise pickle.UnpicklingError(f"{module}.{name} is not admitted")
        return super().find_class(module, name)


def token_at(place: int) -> int:
    """What is drawn at this place of a sequence."""
    return 2 + (5 * place) % (VOCABULARY - 2)


class FakeSGLang:
    """``say`` maps a path to what to do instead of the proper thing: a status, or a coroutine function of the writer.

    step: seconds a token. step_of: what a draw's step is by its prompt's first token. parameters: what it holds.
    """

    def __init__(self, key: str | None = None, step: float = 0.0, **facts: Any):
        self.key, self.step = key, step
        self.facts = {"tp_size": 1, "max_req_input_len": 500, "max_total_num_tokens": 9999, **facts}
        self.weight_version = "default"
        self.parameters: dict[str, torch.Tensor] = {}
        self.known: set[str] | None = None  # names that it takes; None: all
        self.readable = True
        self.say: dict[str, Any] = {}
        self.calls: list[tuple[str, Any]] = []
        self.asleep: set[str] = set()
        self.running: dict[str, asyncio.Event] = {}
        self.most_running = 0
        self.stops_at: int | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(10)

    def start(self) -> None:
        """Also once more, at the same port."""

        async def listen() -> None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

        self.on_loop(listen())

    def die(self) -> None:
        """As a process does that is killed: nothing listens, and every connection is reset."""

        async def leave() -> None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            self.running.clear()
            self.weight_version = "default"

        self.on_loop(leave())

    def close(self) -> None:
        self.die()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)

    def bodies(self, path: str) -> list[Any]:
        return [body for called, body in self.calls if called == path]

    # ---- HTTP

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                await self._answer(head.decode(), reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = head.split("\r\n")
        path = first.split(" ")[1]
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        raw = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(raw) if raw else None
        self.calls.append((path, body))
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return await send(writer, 401, {"error": "Unauthorized"})
        told = self.say.get(path)
        if callable(told):
            return await told(writer)
        if told:
            return await send(writer, told, {"message": "as it was told"})
        if path == "/generate":
            return await self._generate(body, writer)
        handler: Callable[[Any], tuple[int, Any]] = getattr(self, path.strip("/"), lambda body: (404, {"detail": path}))
        await send(writer, *handler(body))

    # ---- paths

    def model_info(self, _: Any) -> tuple[int, Any]:
        return 200, {
            "model_path": "some/model",
            "architectures": ["Qwen2ForCausalLM"],
            "weight_version": self.weight_version,
        }

    def server_info(self, _: Any) -> tuple[int, Any]:
        return 200, {"version": "0.5.14", **self.facts}

    def flush_cache(self, _: Any) -> tuple[int, Any]:
        return (400, "busy") if self.running else (200, "Cache flushed.")

    def abort_request(self, body: Any) -> tuple[int, Any]:
        for rid, aborted in self.running.items():
            if body.get("abort_all") or rid.startswith(body["rid"]):
                aborted.set()
        return 200, ""

    def update_weights_from_tensor(self, body: Any) -> tuple[int, Any]:
        entries = body["serialized_named_tensors"]
        assert len(entries) == self.facts["tp_size"]
        named = Admitted(io.BytesIO(base64.b64decode(entries[-1]))).load()
        return self._take(dict(named), body)

    def update_weights_from_disk(self, body: Any) -> tuple[int, Any]:
        folder = Path(body["model_path"])
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        named: dict[str, torch.Tensor] = {}
        for shard in set(index.values()):
            named |= load_file(folder / shard)
        assert named.keys() == index.keys()
        return self._take(named, body)

    def _take(self, named: dict[str, torch.Tensor], body: Any) -> tuple[int, Any]:
        self.parameters |= {name: tensor for name, tensor in named.items() if self.known is None or name in self.known}
        self.weight_version = body["weight_version"]
        return 200, {"success": True, "message": "Success"}

    def get_weights_by_name(self, body: Any) -> tuple[int, Any]:
        held = self.parameters.get(body["name"])
        if held is None or not self.readable:
            return 400, {"error": {"message": "Get parameter by name failed"}}
        return 200, held.float().tolist()[: body["truncate_size"]]

    def weights_checker(self, body: Any) -> tuple[int, Any]:
        assert body == {"action": "reset_tensors"}
        self.parameters = {name: torch.rand_like(held.float()) for name, held in self.parameters.items()}
        return 200, {"success": True, "message": ""}

    def release_memory_occupation(self, body: Any) -> tuple[int, Any]:
        assert self.asleep.isdisjoint(body["tags"])  # the real one would end
        self.asleep |= set(body["tags"])
        return 200, None

    def resume_memory_occupation(self, body: Any) -> tuple[int, Any]:
        self.asleep.difference_update(body["tags"])
        return 200, None

    async def _generate(self, body: Any, writer: asyncio.StreamWriter) -> None:
        assert not self.asleep
        prompt, sampling = body["input_ids"], body["sampling_params"]
        stops = () if sampling["ignore_eos"] else (sampling.get("stop_token_ids") or ())
        self.running[body["rid"]] = aborted = asyncio.Event()
        self.most_running = max(self.most_running, len(self.running))
        entries: list[list[Any]] = []
        finish: dict[str, Any] | None = None
        if body.get("stream"):
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        try:
            while finish is None:
                if self.step:
                    with contextlib.suppress(TimeoutError):
                        await asyncio.wait_for(aborted.wait(), self.step)
                if aborted.is_set():
                    finish = {"type": "abort", "message": "Aborted"}
                else:
                    token = token_at(len(prompt) + len(entries))
                    entries.append([-token / VOCABULARY, token, None])
                    if token in stops or token == self.stops_at:
                        finish = {"type": "stop", "matched": token}
                    elif len(entries) == sampling["max_new_tokens"]:
                        finish = {"type": "length", "length": len(entries)}
                if body.get("stream") and (finish or len(entries) % sampling["stream_interval"] == 1):
                    await chunk(writer, b"data: " + json.dumps(self._output(body, entries, finish)).encode() + b"\n\n")
        finally:
            self.running.pop(body["rid"], None)
        if body.get("stream"):
            await chunk(writer, b"data: [DONE]\n\n")
            await chunk(writer, b"")
        else:
            await send(writer, 200, self._output(body, entries, finish))

    def _output(self, body: Any, entries: list[list[Any]], finish: Any) -> Any:
        scores = [sum(float(held.float().sum()) for held in self.parameters.values())] * len(body["input_ids"])
        meta = {
            "id": body["rid"],
            "finish_reason": finish,
            "completion_tokens": len(entries),
            "weight_version": self.weight_version,
            "output_token_logprobs": entries,
            "input_token_logprobs": [[None, 0, None], *([score, 0, None] for score in scores[1:])],
        }
        return {"output_ids": [entry[1] for entry in entries], "meta_info": meta}


async def send(writer: asyncio.StreamWriter, status: int, content: Any) -> None:
    data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    await writer.drain()


async def chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
    writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
    await writer.drain()


async def hang(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(3600)


async def reset(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
