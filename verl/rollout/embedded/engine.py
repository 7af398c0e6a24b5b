"""The embedded engine: decodes with the trainer's own module, in the trainer's process, without a copy of its weights.

    generate() ──> waiting ──(a free slot)──> rows in the decoder ──> results
                      ^                             │
                      └──── update_weights() ───────┘   (what was drawn is kept, its cache is not)

One task steps the decoder while there is work and the engine is not paused. Between steps it gives way to the event
loop, so every other method runs when no forward does. No event loop is kept: the engine outlives asyncio.run().
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from verl.errors import UserError
from verl.rollout.contract.base import Capabilities, IllegalState, MemoryTag, Request, Result, Unsupported
from verl.rollout.contract.requests import check_ids, check_request
from verl.rollout.contract.sequence import TokenSequence
from verl.rollout.embedded.decoder import Decoder
from verl.rollout.embedded.kv_cache import slots_attending
from verl.rollout.embedded.unsharded_forward import UnshardedForward


class HFEngine:
    """See ``verl.rollout.contract.base.RolloutEngine``.

    module: a transformers causal LM; its training mode and attention implementation are put back after each use.
    tokenizer: for stop strings.
    eos_token_ids: the tokens that end a response unless its request ignores them.
    max_model_len: tokens of prompt and response together; max_num_seqs: responses decoded at a time. The cache holds
        at most their product in tokens, grows as needed and is freed whenever nothing is under way.
    max_prefill_tokens: prompt tokens that one step adds at most (one prompt at least).
    root: the root of sharding around ``module``, if FSDP shards it (see ``whole_weights``), and
        reshard_after_forward: what its inner modules were sharded with.
    version: of the weights now in the module.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        max_num_seqs: int = 256,
        max_prefill_tokens: int = 8192,
        root: torch.nn.Module | None = None,
        reshard_after_forward: bool = True,
        version: int = 0,
    ):
        config = module.config.get_text_config(decoder=True)
        _check_architecture(module, config)
        self.capabilities = Capabilities(holds_weights=False, stop_strings=tokenizer is not None)
        self._module, self._tokenizer = module, tokenizer
        self._eos = frozenset(eos_token_ids)
        self._max_model_len, self._vocab_size = max_model_len, config.vocab_size
        self._forward = UnshardedForward(module, module if root is None else root, reshard_after_forward)
        self._config = config
        self._decoder = Decoder(self._forward, max_num_seqs, max_model_len, max_prefill_tokens)
        self._waiting: deque[TokenSequence] = deque()
        self._in_flight: dict[str, TokenSequence] = {}
        self._task: asyncio.Task[None] | None = None
        self._paused = self._closed = False
        self.update_seconds: dict[str, float] = {}
        self.version = version

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        self._check_open("generate")
        rows = [self._row(request) for request in requests]
        ids = [request.id for request in requests]
        check_ids(ids, self._in_flight)
        self._in_flight.update(zip(ids, rows, strict=True))
        self._waiting.extend(rows)
        self._start()
        try:
            return await asyncio.gather(*(row.future for row in rows))
        finally:
            self._drop([row for row in rows if self._in_flight.get(row.request.id) is row])

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        self._leave_closed_loop()
        chosen = set(self._in_flight if ids is None else ids)
        rows = [row for request_id, row in self._in_flight.items() if request_id in chosen]
        self._drop(rows)
        for row in rows:
            row.finish("abort")

    async def pause(self) -> None:
        self._check_open("pause")
        if self._paused:
            raise IllegalState("pause: the engine is already paused")
        self._paused = True
        await self._stopped()

    async def resume(self) -> None:
        self._check_open("resume")
        if not self._paused:
            raise IllegalState("resume: the engine is not paused")
        self._paused = False
        self._start()

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Takes the version; the stream is not read, as the module holds the trainer's weights already."""
        self._check_open("update_weights")
        if self._in_flight and not self._paused:
            raise IllegalState(
                f"update_weights: {len(self._in_flight)} requests are being generated; pause or abort them first"
            )
        self._waiting.extendleft(reversed(self._decoder.clear()))
        self.version = version

    async def check_weights(self, stream: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """None can differ: there is one copy."""
        self._check_open("check_weights")
        return []

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        raise Unsupported(
            "the embedded engine cannot sleep: its weights are the trainer's, its cache is freed when idle"
        )

    async def wake(self, tags: Sequence[MemoryTag]) -> None:
        raise Unsupported("the embedded engine cannot wake, as it never sleeps")

    async def health(self) -> None:
        self._check_open("health")

    async def close(self) -> None:
        await self.abort()
        self._closed = True
        await self._stopped()

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Under FSDP, generate only within this: gathers the weights on entry, which every rank has to do together,
        and frees them on leaving. Between the two no rank waits for another. Without FSDP it does nothing."""
        with self._forward.unsharded():
            yield
            self._leave_closed_loop()
            if self._task is not None and not self._task.done():
                raise IllegalState("whole_weights: left while requests are being generated; pause or abort them first")

    def _row(self, request: Request) -> TokenSequence:
        prompt = np.array(request.prompt_ids, np.int64)
        check_request(request, prompt, self.capabilities, self._max_model_len, self._vocab_size)
        return TokenSequence.of(request, asyncio.get_running_loop().create_future(), prompt, self._eos, self._tokenizer)

    def _start(self) -> None:
        if self._in_flight and not self._paused and (self._task is None or self._task.done()):
            self._task = asyncio.get_running_loop().create_task(self._run())

    def _leave_closed_loop(self) -> None:
        """Forget requests whose event loop was closed in the middle of them: nobody can await their results."""
        if self._task is not None and self._task.get_loop().is_closed():
            self._drop(list(self._in_flight.values()))
            self._task = None

    async def _run(self) -> None:
        try:
            with self._borrowed(), slots_attending(self._config):
                while self._in_flight and not self._paused:
                    for row, reason in self._decoder.step(self._waiting, self.version, self._module.device):
                        del self._in_flight[row.request.id]
                        row.finish(reason)
                    if self._in_flight:
                        await asyncio.sleep(0)
        except Exception as error:  # goes to every caller; the engine is left empty and fit for use
            rows = list(self._in_flight.values())
            self._drop(rows)
            for row in rows:
                row.fail(error)
        finally:  # also when an event loop that ends cancels this
            self._free_if_idle()

    def _free_if_idle(self) -> None:
        if not self._in_flight:
            self._decoder.clear()

    async def _stopped(self) -> None:
        """Wait until no forward will run (the task, told to stop, finishes)."""
        if self._task is not None and not self._task.done():
            await asyncio.wait([self._task])

    def _drop(self, rows: Sequence[TokenSequence]) -> None:
        if not rows:
            return
        for row in rows:
            del self._in_flight[row.request.id]
        leaving = set(rows)
        self._decoder.remove(leaving)
        if any(row in leaving for row in self._waiting):
            self._waiting = deque(row for row in self._waiting if row not in leaving)
        self._free_if_idle()

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """The module in evaluation mode, without dropout and gradient checkpointing; afterwards as it was."""
        training = [part for part in self._module.modules() if part.training]
        self._module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True

    def _check_open(self, order: str) -> None:
        self._leave_closed_loop()
        if self._closed:
            raise IllegalState(f"{order}: the engine is closed")


def _check_architecture(module: PreTrainedModel, config: PretrainedConfig) -> None:
    unknown_layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    reasons = {
        f"it has layers of kind {', '.join(sorted(unknown_layers))}": unknown_layers,
        "its attention does not go through transformers' AttentionInterface": not module._supports_attention_backend,
        "it caches latents, not keys and values": getattr(config, "kv_lora_rank", None),
        "it caps its attention logits": getattr(config, "attn_logit_softcapping", None),
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(
                f"the embedded engine (rollout.name=hf) cannot decode {type(module).__name__}: {reason}; use "
                "rollout.name=sglang or vllm for this model"
            )
