"""A response under way, token by token: the same for every engine of ours that sees tokens one at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from verl.rollout.contract.base import FinishReason, Request, Result
from verl.rollout.contract.stops import StopWatch


@dataclass(eq=False)
class TokenSequence:
    """A response under way.

    future: of asyncio or concurrent.futures, for the Result. prompt: int64. stop_ids: every token that ends it.
    versions: as in Result. length: of prompt and response so far.
    """

    request: Request
    future: Any
    prompt: np.ndarray
    stop_ids: frozenset[int]
    watch: StopWatch | None
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    versions: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(
        cls, request: Request, future: Any, prompt: np.ndarray, eos: frozenset[int], tokenizer: Any
    ) -> TokenSequence:
        """eos: the model's own end tokens. tokenizer: for stop strings."""
        sampling = request.sampling
        stop_ids = frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos)
        watch = StopWatch(tokenizer, sampling.stop) if sampling.stop else None
        return cls(request, future, prompt, stop_ids, watch)

    def __post_init__(self) -> None:
        self.length = len(self.prompt)
        self.prompt_key = self.prompt.tobytes()  # bytes keep their hash

    @property
    def last(self) -> int:
        return self.ids[-1] if self.ids else int(self.prompt[-1])

    def finish(self, reason: FinishReason) -> None:
        """Hand out what was drawn, unless its caller has gone."""
        if not self.future.done():
            self.future.set_result(Result(self.request.id, self.ids, self.log_probs, reason, self.versions))

    def fail(self, error: Exception) -> None:
        if not self.future.done():
            self.future.set_exception(error)

    def take_all(self, tokens: list[int], log_probs: list[float], version: int) -> FinishReason | None:
        """As ``take`` of one after the other, up to the one that ends the response. Where it is plain that none but the
        last can, they are not looked at one by one: hundreds of responses may end together."""
        head = len(tokens) - 1
        if head > 0 and self.watch is None and self.stop_ids.isdisjoint(tokens[:head]):
            self._mark(version)
            self.ids += tokens[:head]
            self.log_probs += log_probs[:head]
            self.length += head
            return self.take(tokens[head], log_probs[head], version)
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if reason := self.take(token, log_prob, version):
                return reason
        return None

    def take(self, token: int, log_prob: float, version: int) -> FinishReason | None:
        """Append a token; why the response ends with it, if it does."""
        self._mark(version)
        self.ids.append(token)
        self.length += 1
        self.log_probs.append(log_prob)
        said_stop = self.watch is not None and self.watch.push(token)
        sampling = self.request.sampling
        if token in self.stop_ids or (said_stop and len(self.ids) >= sampling.min_new_tokens):
            return "stop"
        return "length" if len(self.ids) >= sampling.max_new_tokens else None

    def _mark(self, version: int) -> None:
        if not self.versions or self.versions[-1][0] != version:
            self.versions.append((version, len(self.ids)))
