"""An SGLang server that was started elsewhere, as a backend of ``ClientEngine``: everything goes over HTTP.

    client ── draw, recall ──> event loop in a thread ── POST /generate ──> server
    client <── drawn, died ──┘       └── a sign of life, while anything is under way

The server is this run's alone: its weights are replaced. Every answer says which weights drew it, so a server that was
restarted in between, or was given weights by somebody else, is taken for dead and not for a source of samples.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from verl.errors import UserError
from verl.rollout.client.backend import EngineDied, GenerateRequest, Listener, WeightStream
from verl.rollout.contract.base import Capabilities, MemoryTag, PromptWindow
from verl.rollout.engines.sglang.api import SIGN_OF_LIFE, Refused, ServerAPI, Unreachable
from verl.rollout.engines.sglang.http_requests import ServerRequests, Times
from verl.rollout.engines.sglang.payload import update_body
from verl.rollout.engines.sglang.probes import MOST_ELEMENTS, ROWS, ReadBack, compare_scores, probe_prompt
from verl.rollout.weights.disk import SavedWeights, WeightFolder, host_buckets

KEY_SETTING = "actor_rollout_ref.rollout.server_api_key_env"
# Of a server that does not say how many tokens it prefills at a time, and how many responses it draws.
PREFILL, RUNNING = 8192, 1024


class SGLangServer:
    """See ``verl.rollout.client.backend.Backend``. Returns once the server has said what it is.

    folder: weights go through it; None: they go through HTTP, in buckets of bucket_bytes.
    dtype: that weights are sent in; None: their own. end_tokens: those of the model, which SGLang always stops at.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str | None = None,
        folder: WeightFolder | None = None,
        bucket_bytes: int = 64 << 20,
        dtype: torch.dtype | None = None,
        end_tokens: Sequence[int],
        max_model_len: int,
        vocab_size: int,
        times: Times | None = None,
    ):
        self.url = url.rstrip("/")
        self._api = ServerAPI(url, key, KEY_SETTING)
        self._folder, self._bucket_bytes, self._dtype = folder, bucket_bytes, dtype
        self._end_tokens, self._vocab_size = frozenset(end_tokens), vocab_size
        self._times = times or Times()
        self.update_seconds: dict[str, float] = {}
        self._run = f"verl-{secrets.token_hex(4)}"  # no other client's requests or weights have this in their names
        self._asleep: set[MemoryTag] = set()
        try:
            self.facts = self._api.call(self._facts())
            self._check_context(max_model_len)
        except BaseException:
            self._api.close()
            raise
        incremental = bool(self.facts.get("incremental_streaming_output"))
        self._requests = ServerRequests(self._api, self._run, self._times, incremental=incremental)
        self.keeps_weights = bool(self.facts.get("enable_weights_cpu_backup"))
        self.capabilities = Capabilities(
            sleep=frozenset({"weights", "kv_cache"} if self.facts.get("enable_memory_saver") else ()),
            own_process=True,
            min_new_tokens=False,  # needs the server's tokenizer, which it may not have
            seeded=False,
            window=PromptWindow.of(
                _positive(self.facts.get("chunked_prefill_size"), PREFILL),
                _positive(self.facts.get("max_running_requests"), RUNNING),
            ),
        )

    async def _facts(self) -> dict[str, Any]:
        model = await self._api.get("/model_info")
        server = await self._api.get("/server_info")
        if not (isinstance(model, dict) and isinstance(server, dict) and "version" in server):
            raise UserError(f"{self.url} answers, but not as an SGLang server does: is the URL right?")
        if self._api.has_key and await self._api.open_to_anybody("/server_info"):
            raise UserError(
                f"the SGLang server at {self.url} has no key: whoever reaches it can read its samples and replace its "
                f"weights. Start it with --api-key and what the variable of {KEY_SETTING} holds"
            )
        return {**server, **model}

    def _check_context(self, max_model_len: int) -> None:
        """max_req_input_len: one token more than the longest prompt, which is to leave room for one of response."""
        longest = self.facts.get("max_req_input_len")
        if longest is not None and longest < max_model_len:
            raise UserError(
                f"the SGLang server at {self.url} takes sequences of {longest} tokens, and this run's have up to "
                f"{max_model_len}: start it with --context-length {max_model_len + 8} or more (and room for as many "
                "tokens in its KV cache), or make prompts and responses shorter"
            )

    def describe(self) -> str:
        facts = self.facts
        return (
            f"SGLang {facts['version']} at {self.url}: {facts.get('model_path')}, {facts.get('tp_size', 1)} devices, "
            f"room for {facts.get('max_total_num_tokens', 0):,} tokens"
        )

    # ---- draws

    def listen(self, listener: Listener) -> None:
        self._requests.listener = listener

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        """As in ``SubprocessBackend``. That the end tokens are the server's is checked whenever it stops at one."""
        return not stop_ids or (bool(self._end_tokens) and stop_ids >= self._end_tokens)

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self._requests.generate(requests)

    def abort(self, request_ids: Sequence[str]) -> None:
        self._requests.abort(request_ids)

    # ---- orders

    def update_weights(self, stream: WeightStream, version: int) -> None:
        """Names that the server has no place for it ignores without a word: see check_weights."""
        name = f"{self._run}-{version}"
        self._requests.weights = None
        read_back = self._send(stream, version, name)
        if different := self._order(read_back.differences(self._api)):
            raise UserError(
                f"after a weight update {self.url} does not hold what it was sent:\n" + "\n".join(different)
            )
        now = self._order(self._api.get("/model_info")).get("weight_version")
        if now != name:
            raise UserError(f"after a weight update {self.url} says that its weights are {now!r}, not {name!r}")
        self._requests.weights = name

    def _send(self, stream: WeightStream, version: int, name: str) -> ReadBack:
        read_back = ReadBack()
        if self._folder is not None:
            saved = stream if isinstance(stream, SavedWeights) else self._folder.write(stream, version)
            body = {"model_path": str(saved.folder), "load_format": "auto", "weight_version": name}
            self._update("/update_weights_from_disk", json.dumps(body).encode(), self._times.disk)
            for tensor_name, beginning in saved.beginnings(ROWS, MOST_ELEMENTS):
                read_back.note(tensor_name, beginning)
            if saved is not stream:
                self._folder.forget(saved)
            return read_back
        for bucket in host_buckets(stream, self._bucket_bytes, self._dtype):
            for tensor_name, tensor in bucket:
                read_back.note(tensor_name, tensor)
            body_bytes = update_body(bucket, self.facts.get("tp_size", 1), name)
            self._update("/update_weights_from_tensor", body_bytes, self._times.bucket)
        return read_back

    def _update(self, path: str, body: bytes, timeout: float) -> None:
        try:
            answer = self._order(self._api.post(path, body, timeout))
        except Refused as error:
            raise UserError(f"the weight update was refused: {error}") from error
        except EngineDied as error:
            raise EngineDied(
                f"{error} (during a weight update: tensors that are not its model's end a server; its output says)"
            ) from error
        if not (isinstance(answer, dict) and answer.get("success")):
            raise UserError(f"the weight update was refused: {self.url}{path} answered {answer}")

    def check_weights(self, stream: WeightStream) -> list[str]:
        """By what the weights do. The log-probs of a fixed text are taken; all parameters of the server are overwritten
        with noise; the stream is sent again; and the log-probs have to come out as they were. That holds only if the
        stream fills every parameter that has a say, and if the server held the same before. Which tensor it is that
        differs cannot be told: SGLang gives no checksums by the names of a checkpoint."""
        name, self._requests.weights = self._requests.weights or f"{self._run}-check", None
        with self._cache_awake():
            different = self._overwritten_and_sent_again(stream, name)
        self._requests.weights = name
        return different

    @contextmanager
    def _cache_awake(self) -> Iterator[None]:
        """For a forward while the client has the server's cache asleep, which the server would not survive."""
        slept: list[MemoryTag] = ["kv_cache"] if "kv_cache" in self._asleep else []
        if slept:
            self.wake(slept)
        yield
        if slept:
            self.sleep(slept)

    def _overwritten_and_sent_again(self, stream: WeightStream, name: str) -> list[str]:
        before = self._order(self._scores())
        try:
            self._order(self._api.post("/weights_checker", {"action": "reset_tensors"}, self._times.bucket))
        except Refused as error:
            raise UserError(
                f"trainer.check_weights: {self.url} cannot overwrite its weights with noise ({error}), so that nothing "
                "can be told of them; set trainer.check_weights=never"
            ) from error
        self._send(stream, -1, name)
        return compare_scores(before, self._order(self._scores()))

    async def _scores(self) -> list[float]:
        """Log-probs of the probe's tokens but the first."""
        body = {
            "rid": f"{self._run}-probe-{secrets.token_hex(4)}",
            "input_ids": probe_prompt(self._vocab_size, self.facts.get("max_req_input_len")),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "ignore_eos": True},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._api.post("/generate", body, self._times.bucket)
        scores = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        await self._drop_cache()
        return [float("nan") if score is None else score for score in scores]

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self._order(self._api.post("/release_memory_occupation", {"tags": list(tags)}))
        self._asleep |= set(tags)
        if "weights" in tags and not self.keeps_weights:
            self._requests.weights = None

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        self._order(self._api.post("/resume_memory_occupation", {"tags": list(tags)}))
        self._asleep -= set(tags)

    def drop_cache(self) -> None:
        self._order(self._drop_cache())

    async def _drop_cache(self) -> None:
        """Also says that nothing is being drawn, which SGLang asserts in orders that follow."""
        deadline = time.monotonic() + self._times.idle
        while True:
            try:
                return await self._api.post("/flush_cache", {})
            except Refused as error:
                if error.status != 400 or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(self._times.abort_every)

    def health(self) -> None:
        self._order(self._api.get(SIGN_OF_LIFE, self._times.probe_timeout))

    def close(self) -> None:
        """The server stays, with the weights that it has, and awake, as the next run will take it to be."""
        asleep, self._asleep = sorted(self._asleep), set()
        if asleep:
            with contextlib.suppress(UserError):
                self._order(self._api.post("/resume_memory_occupation", {"tags": asleep}))
        self._api.close()

    def _order(self, work: Any) -> Any:
        """Its answer. No answer is the death of the server."""
        if self._requests.death:
            work.close()
            raise EngineDied(str(self._requests.death))
        try:
            return self._api.call(work)
        except Unreachable as error:
            self._requests.die(error)
            raise EngineDied(f"the SGLang server at {self.url} is gone: {error}") from None


def _positive(value: Any, default: int) -> int:
    return value if isinstance(value, int) and value > 0 else default
