"""What ``ClientEngine`` needs of an inference engine that runs elsewhere: in a process of ours, or on a server.

A backend draws tokens and reports them from a thread of its own. It knows nothing of stop strings, of partial
responses or of which order makes sense when: the client does, once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from verl.errors import UserError
from verl.rollout.contract.base import Capabilities, FinishReason, MemoryTag, SamplingParams

WeightStream = Iterable[tuple[str, torch.Tensor]]


class EngineDied(UserError):  # noqa: N818
    """The engine is gone, or no longer answers. Its unfinished requests can be drawn by another."""


@dataclass(frozen=True)
class GenerateRequest:
    """A response, or the rest of one, to draw.

    id: never used twice, and no id is the beginning of another.
    prompt_ids: with what was drawn of the response before. max_new_tokens: that are left to draw.
    stop_ids: every token that ends the response, the model's own end tokens among them only if they do.
    stream: report tokens as they come; otherwise it may do so once, at the end.
    """

    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    sampling: SamplingParams
    stop_ids: frozenset[int]
    stream: bool
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenChunk:
    """Tokens of a draw that were not reported before, their log-probs, and why it ended, once it has."""

    id: str
    ids: list[int]
    log_probs: list[float]
    finish: FinishReason | None


class Listener(Protocol):
    """Called from a backend's thread."""

    def received(self, reports: Sequence[TokenChunk]) -> None: ...

    def failed(self, request_id: str, error: Exception) -> None: ...

    def died(self, error: EngineDied) -> None: ...


class Backend(Protocol):
    """Orders block until done; each raises EngineDied when the engine is gone.

    keeps_weights: whether weights are still there after they slept.
    """

    capabilities: Capabilities
    keeps_weights: bool

    def listen(self, listener: Listener) -> None: ...

    def stops_at(self, stop_ids: frozenset[int]) -> bool:
        """Whether the engine itself can end a response at exactly these tokens."""
        ...

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        """Start these and return."""
        ...

    def abort(self, request_ids: Sequence[str]) -> None:
        """End these soon; each still reports what it has, with finish "abort" unless it ended by itself."""
        ...

    def update_weights(self, stream: WeightStream, version: int) -> None:
        """Hold exactly these tensors. The engine is idle. Raises UserError for names or shapes that are not its own."""
        ...

    @property
    def update_seconds(self) -> Mapping[str, float]:
        """Of the last weight update, by what they went into; empty where that is not known."""
        ...

    def check_weights(self, stream: WeightStream) -> list[str]:
        """The names of tensors that differ between the stream and what the engine computes with, each with how."""
        ...

    def sleep(self, tags: Sequence[MemoryTag]) -> None: ...

    def wake(self, tags: Sequence[MemoryTag]) -> None: ...

    def drop_cache(self) -> None:
        """Forget all keys and values. The engine is idle."""
        ...

    def health(self) -> None: ...

    def close(self) -> None: ...
