"""A draw as SGLang's sampling parameters."""

from __future__ import annotations

from typing import Any

from verl.rollout.client.backend import GenerateRequest


def sampling_params(request: GenerateRequest) -> dict[str, Any]:
    """A draw that is streamed is watched by the client, which ends it: the engine is told to ignore all end tokens.
    (SGLang's ignore_eos drops the request's own stop tokens, too, and without it the model's own always end.)"""
    sampling = request.sampling
    return {
        "max_new_tokens": request.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "ignore_eos": request.stream or not request.stop_ids,
        "stop_token_ids": None if request.stream else sorted(request.stop_ids),
        "skip_special_tokens": False,
    }
