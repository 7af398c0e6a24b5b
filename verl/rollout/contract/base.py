"""What every rollout engine is: token ids in; token ids, one log-prob a token, finish reason and weight version out.

``tests/conformance`` holds each engine to this page. An engine that cannot do a thing declares it in its
``Capabilities``; asking for it all the same raises ``Unsupported``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from verl.errors import UserError

if TYPE_CHECKING:
    import torch

FinishReason = Literal["stop", "length", "abort"]
MemoryTag = Literal["weights", "kv_cache"]


class Unsupported(UserError):  # noqa: N818
    """The engine declares that it cannot do this."""


class IllegalState(RuntimeError):  # noqa: N818
    """An order that makes no sense now (generate while asleep, wake what is awake); the engine never sees it."""


@dataclass(frozen=True)
class SamplingParams:
    """How one response is drawn.

    temperature: 0 is greedy. Log-probs are ``log_softmax(logits / temperature)`` over the full vocabulary,
        whatever top_p, top_k and min_p left out (temperature 1 for greedy).
    top_p, top_k, min_p: 1.0, -1 and 0.0 are off. Applied after the temperature, in the order top_k, top_p, min_p.
    max_new_tokens, min_new_tokens: with min_new_tokens no stop token is drawn before that many tokens.
    stop_token_ids: end the response; the stop token is part of it, with its log-prob.
    stop: strings that end the response; the tokens up to and including the one that completed it are kept.
    ignore_eos: the model's own end token does not end the response (stop_token_ids still do).
    seed: with (seed, position) the noise is fixed: the same prompt and seed give the same tokens in any batch.
    """

    max_new_tokens: int = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """One response to draw. ``images`` are references (path or URL); ``id`` is unique among requests in flight."""

    id: str
    prompt_ids: Sequence[int]
    sampling: SamplingParams
    images: tuple[str, ...] = ()


@dataclass
class Result:
    """What was drawn. ``weight_versions``: (version, index of the first token it wrote), in order; a response that
    was paused over a weight update has several."""

    id: str
    response_ids: list[int]
    log_probs: list[float]
    finish_reason: FinishReason
    weight_versions: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class PromptWindow:
    """Of an engine that finds a prompt's keys and values in its cache once it has computed them: the different prompts,
    at most so many and of so many tokens in all, that it is best asked for once each before any is asked for again.
    More would have left the cache by then; with fewer they would not have come yet."""

    tokens: int
    prompts: int

    @classmethod
    def of(cls, prefill: int, responses: int) -> PromptWindow:
        """prefill: tokens that are computed at a time: one is under way, one whose results are taken meanwhile, and one
        to spare. responses: that are drawn at a time."""
        return cls(tokens=3 * prefill, prompts=responses)


@dataclass(frozen=True)
class Capabilities:
    """What an engine declares. ``sleep``: the memory tags it can free. ``own_process``: its death is not the trainer's.
    ``holds_weights``: it has a copy of its own, which update_weights fills (False: it reads the trainer's). ``window``:
    None for an engine that is best asked for all responses to a prompt in a row."""

    sleep: frozenset[MemoryTag] = frozenset()
    own_process: bool = False
    holds_weights: bool = True
    images: bool = False
    stop_strings: bool = True
    min_new_tokens: bool = True
    seeded: bool = True
    window: PromptWindow | None = None


class RolloutEngine(Protocol):
    """update_seconds: of the last weight update, by what they went into; empty where the engine does not know."""

    capabilities: Capabilities

    @property
    def update_seconds(self) -> Mapping[str, float]: ...

    async def generate(self, requests: Sequence[Request]) -> list[Result]:
        """Draw one response for each request, in the order given; many calls may be in flight together.

        Raises UserError for a prompt that leaves no room (prompt + max_new_tokens over the context length) or a
        request that the engine declares it cannot serve; IllegalState while asleep or after close."""
        ...

    async def abort(self, ids: Sequence[str] | None = None) -> None:
        """End these requests (all, by default): their generate calls return what they have, finish_reason "abort"."""
        ...

    async def pause(self) -> None:
        """Stop drawing; when it returns, no forward is under way. Requests keep what they have; new ones queue."""
        ...

    async def resume(self) -> None:
        """Go on; after a weight update, on the new weights (the cache of old ones is dropped)."""
        ...

    async def update_weights(self, stream: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Hold exactly these tensors (HF names, full shapes). An unknown or missing name is an error. Needs an engine
        that is idle or paused. An engine without weights of its own takes only the version."""
        ...

    async def check_weights(self, stream: Iterable[tuple[str, torch.Tensor]]) -> list[str]:
        """The tensors of the stream (as for update_weights) that differ from what the engine computes with: the name
        of each, with how. Checksums, made from the parameters themselves where they are."""
        ...

    async def sleep(self, tags: Sequence[MemoryTag]) -> None:
        """Free this memory. Needs an idle engine."""
        ...

    async def wake(self, tags: Sequence[MemoryTag]) -> None: ...

    async def health(self) -> None:
        """Return when the engine would serve a request; raise saying why not."""
        ...

    async def close(self) -> None:
        """Abort everything and free everything; closing twice is no error."""
        ...
