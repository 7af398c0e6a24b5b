"""An SGLang server that was started elsewhere, as a backend of ``ClientEngine``: everything goes over HTTP.

    client ── draw, recall ──> event loop in a thread ── POST /generate ──> server
    client <── drawn, died ──┘       └── GET /health, while anything is under way

The server is this run's alone: its weights are replaced. Every answer says which weights drew it, so a server that was
restarted in between, or was given weights by somebody else, is taken for dead and not for a source of samples.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from verl.errors import UserError
from verl.rollout.backend import Draw, Drawn, EngineDied, Listener, WeightStream
from verl.rollout.base import Capabilities, MemoryTag
from verl.rollout.sglang.api import Refused, ServerAPI, Unreachable
from verl.rollout.sglang.payload import buckets, update_body
from verl.rollout.sglang.probes import ReadBack, compare_scores, probe_prompt
from verl.rollout.sglang.requests import sampling_params
from verl.rollout.weights.disk import SavedWeights, WeightFolder

KEY_SETTING = "actor_rollout_ref.rollout.server_api_key_env"
MOST_OPEN = 1024  # connections to one server
ATTEMPTS = 3  # at a draw whose connection breaks while the server lives
# A streamed answer repeats all that came before, so tokens come in lots; this many may be drawn past a stop.
STREAM_INTERVAL = 32
OVERLOADED = (502, 503, 504)


@dataclass(frozen=True)
class Times:
    """Seconds. probe_every, probe_timeout: of a look at the server while it draws; SGLang itself takes up to 20 to say
    that it is not well. dead_after: without a sign of life. idle: until it has stopped drawing what it was told to."""

    probe_every: float = 5.0
    probe_timeout: float = 30.0
    dead_after: float = 60.0
    recall_every: float = 0.05
    retry_after: float = 1.0
    idle: float = 60.0
    bucket: float = 300.0
    disk: float = 1800.0


@dataclass(eq=False)
class _UnderWay:
    """A draw. rid: what the server knows it as; None: not sent yet. ids: reported so far."""

    draw: Draw
    task: asyncio.Task[None] | None = None
    rid: str | None = None
    ids: list[int] = dataclasses.field(default_factory=list)
    recalled: bool = False


class SGLangServer:
    """See ``verl.rollout.backend.Backend``. Returns once the server has said what it is.

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
        self._run = f"verl-{secrets.token_hex(4)}"  # no other client's requests or weights have this in their names
        self._weights: str | None = None  # the version that every answer has to name, once it is ours
        self._listener: Listener | None = None
        self._under_way: dict[str, _UnderWay] = {}  # of the event loop, as are the three that follow
        self._room = asyncio.Semaphore(MOST_OPEN)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._sign = 0.0  # when the server last showed that it lives
        self.death: EngineDied | None = None
        self._asleep: set[MemoryTag] = set()
        try:
            self.facts = self._api.call(self._facts())
            self._check_context(max_model_len)
        except BaseException:
            self._api.close()
            raise
        self.keeps_weights = bool(self.facts.get("enable_weights_cpu_backup"))
        self.capabilities = Capabilities(
            sleep=frozenset({"weights", "kv_cache"} if self.facts.get("enable_memory_saver") else ()),
            own_process=True,
            min_new_tokens=False,  # needs the server's tokenizer, which it may not have
            seeded=False,
        )

    async def _facts(self) -> dict[str, Any]:
        model = await self._api.get("/model_info")
        server = await self._api.get("/server_info")
        if not (isinstance(model, dict) and isinstance(server, dict) and "version" in server):
            raise UserError(f"{self.url} answers, but not as an SGLang server does: is the URL right?")
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
        self._listener = listener

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        """As in ``SGLangProcess``. That the end tokens are the server's is checked whenever it stops at one."""
        return not stop_ids or (bool(self._end_tokens) and stop_ids >= self._end_tokens)

    def draw(self, draws: Sequence[Draw]) -> None:
        self._api.loop.call_soon_threadsafe(self._start, list(draws))

    def recall(self, draw_ids: Sequence[str]) -> None:
        self._api.loop.call_soon_threadsafe(self._recall, list(draw_ids))

    def _start(self, draws: Sequence[Draw]) -> None:
        if self.death:
            return self._tell(lambda listener: listener.died(EngineDied(str(self.death))))
        if not self._under_way:
            self._sign = time.monotonic()
        for draw in draws:
            self._under_way[draw.id] = work = _UnderWay(draw)
            work.task = asyncio.create_task(self._draw(work))
        self._keep_doing("watch", self._watch)

    async def _draw(self, work: _UnderWay) -> None:
        try:
            async with self._room:
                await self._attempts(work)
        except asyncio.CancelledError:  # recalled before it was sent, or all is over
            if not self.death:
                self._report(Drawn(work.draw.id, [], [], "abort"))
        except EngineDied as error:
            self._die(error)
        except Exception as error:
            failure = error if isinstance(error, UserError) else RuntimeError(f"{type(error).__name__}: {error}")
            self._tell(lambda listener: listener.failed(work.draw.id, failure))
        finally:
            self._under_way.pop(work.draw.id, None)

    async def _attempts(self, work: _UnderWay) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            before, work.rid = work.rid, f"{self._run}-{work.draw.id}-{attempt}"
            try:
                if before:  # the server may still be drawing for a connection that is gone
                    await self._api.post("/abort_request", {"rid": before})
                return await self._ask(work)
            except (Unreachable, Refused) as error:
                if isinstance(error, Refused) and error.status not in OVERLOADED:
                    raise
                if isinstance(error, Unreachable) and error.refused:
                    raise
                if work.recalled:
                    return self._report(Drawn(work.draw.id, [], [], "abort"))
                if attempt == ATTEMPTS:
                    raise EngineDied(f"{error}, {ATTEMPTS} times in a row") from error
                await asyncio.sleep(self._times.retry_after * attempt)
                await self._api.get("/health", self._times.probe_timeout)

    async def _ask(self, work: _UnderWay) -> None:
        """One answer of the server, from the token that is due."""
        draw = work.draw
        due = dataclasses.replace(
            draw, prompt_ids=[*draw.prompt_ids, *work.ids], max_new_tokens=draw.max_new_tokens - len(work.ids)
        )
        if not due.max_new_tokens:
            return self._report(Drawn(draw.id, [], [], "length"))
        sampling = sampling_params(due) | ({"stream_interval": STREAM_INTERVAL} if draw.stream else {})
        body = {
            "rid": work.rid,
            "input_ids": due.prompt_ids,
            "sampling_params": sampling,
            "return_logprob": True,
            "stream": draw.stream,
        }
        if not draw.stream:
            answer = await self._api.post("/generate", body, timeout=None)
            self._take(work, answer, taken=0)
            return
        taken, ended = 0, False
        try:
            async with self._api.client.stream("POST", "/generate", json=body) as response:
                if response.status_code >= 300:
                    self._api.check("/generate", response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        new, ended = self._take(work, json.loads(data), taken)
                        taken += 0 if self.facts.get("incremental_streaming_output") else new
        except httpx.HTTPError as error:
            raise self._api.unreachable("/generate", error) from None
        if not ended:
            raise Unreachable(f"{self.url}/generate broke off its answer", refused=False)

    def _take(self, work: _UnderWay, answer: Any, taken: int) -> tuple[int, bool]:
        """Report what an answer has beyond the first ``taken`` tokens: their number, and whether it is the last."""
        draw = work.draw
        if "error" in answer:
            raise UserError(f"{self.url}/generate did not take the request: {answer['error'].get('message')}")
        meta = answer["meta_info"]
        self._check_weights_of(meta)
        new = (meta.get("output_token_logprobs") or [])[taken:]
        ids, log_probs = [entry[1] for entry in new], [entry[0] for entry in new]
        if None in log_probs:  # JSON knows no NaN
            raise UserError(f"{self.url} drew a token whose log-prob is not a number: are its weights?")
        reason = meta.get("finish_reason") or {}
        finish = reason.get("type")
        if finish == "abort" and reason.get("status_code"):
            raise Refused(f"{self.url}/generate: {reason.get('message')}", int(reason["status_code"]))
        if finish and not draw.stream and meta.get("completion_tokens", len(ids)) != len(ids):
            raise UserError(f"{self.url} drew {meta['completion_tokens']} tokens and gave {len(ids)} log-probs")
        if finish == "stop" and (not ids or ids[-1] not in draw.stop_ids):
            raise UserError(
                f"the SGLang server at {self.url} ended a response with {reason.get('matched')!r}, which is none of "
                f"the end tokens {sorted(draw.stop_ids)} of actor_rollout_ref.model.path: does it serve the same model?"
            )
        self._sign = time.monotonic()
        work.ids += ids
        if ids or finish:
            self._report(Drawn(draw.id, ids, log_probs, finish))
        return len(ids), bool(finish)

    def _check_weights_of(self, meta: dict[str, Any]) -> None:
        if self._weights is not None and meta.get("weight_version") != self._weights:
            raise EngineDied(
                f"the SGLang server at {self.url} has weights {meta.get('weight_version')!r} and not this run's "
                f"({self._weights}): it was restarted, or another program updates it"
            )

    # ---- recalls

    def _recall(self, draw_ids: Sequence[str]) -> None:
        for draw_id in draw_ids:
            if work := self._under_way.get(draw_id):
                work.recalled = True
                if work.rid is None and work.task:
                    work.task.cancel()
        self._keep_doing("recall", self._abort_recalled)

    async def _abort_recalled(self) -> None:
        """Again and again: a request that has not reached SGLang's scheduler yet is not there to be aborted."""
        while recalled := [work for work in self._under_way.values() if work.recalled and work.rid]:
            if len(recalled) == len(self._under_way):
                orders: list[dict[str, Any]] = [{"abort_all": True}]  # one order instead of hundreds
            else:
                orders = [{"rid": work.rid} for work in recalled]
            for start in range(0, len(orders), 32):
                batch = [self._api.post("/abort_request", order) for order in orders[start : start + 32]]
                for outcome in await asyncio.gather(*batch, return_exceptions=True):
                    if isinstance(outcome, Unreachable) and outcome.refused:
                        return self._die(outcome)
            await asyncio.sleep(self._times.recall_every)

    # ---- life and death

    async def _watch(self) -> None:
        while self._under_way:
            await asyncio.sleep(self._times.probe_every)
            try:
                await self._api.get("/health", self._times.probe_timeout)
                self._sign = time.monotonic()
            except (Unreachable, Refused) as error:
                silent = time.monotonic() - self._sign
                if isinstance(error, Unreachable) and error.refused:
                    self._die(error)
                elif silent > self._times.dead_after:
                    self._die(EngineDied(f"{error}; no sign of life for {silent:.0f} s"))

    def _die(self, error: EngineDied) -> None:
        """In the event loop. Told once."""
        if self.death:
            return
        self.death = EngineDied(f"the SGLang server at {self.url} is gone: {error}")
        works, current = list(self._under_way.values()), asyncio.current_task()
        self._under_way.clear()
        for work in works:
            if work.task and work.task is not current:
                work.task.cancel()
        death = self.death
        self._tell(lambda listener: listener.died(death))

    def _keep_doing(self, name: str, what: Callable[[], Awaitable[None]]) -> None:
        """One such task at a time."""
        if name not in self._tasks or self._tasks[name].done():

            async def run() -> None:
                await what()

            self._tasks[name] = asyncio.create_task(run())

    def _report(self, report: Drawn) -> None:
        self._tell(lambda listener: listener.drawn([report]))

    def _tell(self, message: Callable[[Listener], None]) -> None:
        if self._listener is not None:
            message(self._listener)

    # ---- orders

    def update_weights(self, stream: WeightStream, version: int) -> None:
        """Names that the server has no place for it ignores without a word: see check_weights."""
        name = f"{self._run}-{version}"
        self._weights = None
        read_back = self._send(stream, version, name)
        if different := self._order(read_back.differences(self._api)):
            raise UserError(
                f"after a weight update {self.url} does not hold what it was sent:\n" + "\n".join(different)
            )
        now = self._order(self._api.get("/model_info")).get("weight_version")
        if now != name:
            raise UserError(f"after a weight update {self.url} says that its weights are {now!r}, not {name!r}")
        self._weights = name

    def _send(self, stream: WeightStream, version: int, name: str) -> ReadBack:
        read_back = ReadBack()
        if self._folder is not None:
            saved = stream if isinstance(stream, SavedWeights) else self._folder.write(stream, version)
            body = {"model_path": str(saved.folder), "load_format": "auto", "weight_version": name}
            self._update("/update_weights_from_disk", json.dumps(body).encode(), self._times.disk)
            for tensor_name, tensor in saved:
                read_back.note(tensor_name, tensor)
            if saved is not stream:
                self._folder.forget(saved)
            return read_back
        for bucket in buckets(stream, self._bucket_bytes, self._dtype):
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
        if not (isinstance(answer, dict) and answer.get("success")):
            raise UserError(f"the weight update was refused: {self.url}{path} answered {answer}")

    def check_weights(self, stream: WeightStream) -> list[str]:
        """By what the weights do. The log-probs of a fixed text are taken; all parameters of the server are overwritten
        with noise; the stream is sent again; and the log-probs have to come out as they were. That holds only if the
        stream fills every parameter that has a say, and if the server held the same before. Which tensor it is that
        differs cannot be told: SGLang gives no checksums by the names of a checkpoint."""
        name, self._weights = self._weights or f"{self._run}-check", None
        before = self._order(self._scores())
        try:
            self._order(self._api.post("/weights_checker", {"action": "reset_tensors"}, self._times.bucket))
        except Refused as error:
            raise UserError(
                f"trainer.check_weights: {self.url} cannot overwrite its weights with noise ({error}), so that nothing "
                "can be told of them; set trainer.check_weights=never"
            ) from error
        self._send(stream, -1, name)
        after = self._order(self._scores())
        self._weights = name
        return compare_scores(before, after)

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
            self._weights = None

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
            await asyncio.sleep(self._times.recall_every)

    def health(self) -> None:
        """/health draws a token if nothing else is drawn, which memory that is asleep would not survive."""
        path = "/server_info" if self._asleep else "/health"
        self._order(self._api.get(path, self._times.probe_timeout))

    def close(self) -> None:
        """The server stays, with the weights that it has."""
        self._api.close()

    def _order(self, work: Any) -> Any:
        """Its answer. No answer is the death of the server."""
        if self.death:
            work.close()
            raise EngineDied(str(self.death))
        try:
            return self._api.call(work)
        except Unreachable as error:
            self._api.loop.call_soon_threadsafe(self._die, error)
            raise EngineDied(f"the SGLang server at {self.url} is gone: {error}") from None
