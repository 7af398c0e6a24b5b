"""A draw as vLLM's sampling parameters."""

from __future__ import annotations

from typing import Any

from verl.rollout.client.backend import GenerateRequest


def sampling_params(request: GenerateRequest, seeded: bool) -> Any:
    """The model's own end tokens are among the draw's, if they count: vLLM is told to ignore those that it knows."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    sampling = request.sampling
    generated_before = sampling.max_new_tokens - request.max_new_tokens
    return SamplingParams(
        max_tokens=request.max_new_tokens,
        min_tokens=max(0, sampling.min_new_tokens - generated_before),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        seed=sampling.seed if seeded else None,
        ignore_eos=True,
        stop_token_ids=sorted(request.stop_ids),
        logprobs=0,  # of the drawn token alone
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.DELTA if request.stream else RequestOutputKind.FINAL_ONLY,
    )
