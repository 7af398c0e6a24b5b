"""What can be wrong with a request, the same for every engine."""

from __future__ import annotations

from collections.abc import Container, Sequence

import numpy as np

from verl.errors import UserError
from verl.rollout.contract.base import Capabilities, IllegalState, Request, SamplingParams, Unsupported


def check_request(
    request: Request, prompt: np.ndarray, capabilities: Capabilities, max_model_len: int, vocab_size: int
) -> None:
    """Raises UserError (Unsupported for what the engine declares it cannot do) naming the request and the remedy.

    prompt: the request's prompt ids, int64."""
    where = f"request {request.id!r}"
    sampling = request.sampling
    for problem in _sampling_problems(sampling):
        raise UserError(f"{where}: {problem}")
    if len(prompt) == 0:
        raise UserError(
            f"{where}: the prompt is empty; it needs at least one token (a beginning-of-text token will do)"
        )
    if prompt.min() < 0 or prompt.max() >= vocab_size:
        raise UserError(
            f"{where}: prompt ids go from {prompt.min()} to {prompt.max()}, but the model's vocabulary is 0 to "
            f"{vocab_size - 1}; is the tokenizer this model's?"
        )
    if len(prompt) + sampling.max_new_tokens > max_model_len:
        raise UserError(
            f"{where}: a prompt of {len(prompt)} tokens and max_new_tokens={sampling.max_new_tokens} exceed the "
            f"context length of {max_model_len}; shorten the prompt, or ask for at most "
            f"{max(0, max_model_len - len(prompt))} tokens"
        )
    if request.images and not capabilities.images:
        raise Unsupported(f"{where}: this engine does not take images")
    if sampling.stop and not capabilities.stop_strings:
        raise Unsupported(f"{where}: this engine has no tokenizer, so it cannot watch for stop strings {sampling.stop}")
    if sampling.min_new_tokens and not capabilities.min_new_tokens:
        raise Unsupported(f"{where}: this engine does not support min_new_tokens")


def check_ids(ids: Sequence[str], in_flight: Container[str]) -> None:
    """Raises IllegalState for one that is in flight, or comes twice."""
    seen: set[str] = set()
    for id in ids:
        if id in in_flight or id in seen:
            raise IllegalState(f"generate: a request with id {id!r} is already in flight")
        seen.add(id)


def _sampling_problems(sampling: SamplingParams) -> list[str]:
    rules = {
        f"max_new_tokens={sampling.max_new_tokens} must be at least 1": sampling.max_new_tokens >= 1,
        f"min_new_tokens={sampling.min_new_tokens} must be from 0 to max_new_tokens={sampling.max_new_tokens}": (
            0 <= sampling.min_new_tokens <= sampling.max_new_tokens
        ),
        f"temperature={sampling.temperature} must be 0 (greedy) or more": sampling.temperature >= 0,
        f"top_p={sampling.top_p} must be over 0 and at most 1": 0 < sampling.top_p <= 1,
        f"top_k={sampling.top_k} must be -1 (off) or at least 1": sampling.top_k == -1 or sampling.top_k >= 1,
        f"min_p={sampling.min_p} must be at least 0 and under 1": 0 <= sampling.min_p < 1,
        "an empty stop string would stop everything": all(sampling.stop),
    }
    return [problem for problem, holds in rules.items() if not holds]
