"""vLLM's sampler, held to our contract on log-probs and seeds.

vLLM has log-probs of the logits ("raw"), at temperature 1, or of what is left of them after temperature, top_k, top_p
and min_p ("processed"). Ours are of the logits at the sampling temperature, over the full vocabulary.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from vllm.v1.sample.sampler import Sampler

GREEDY_BELOW = 1e-5  # temperatures that vLLM takes for 0


class ContractSampler(Sampler):
    """runner: vLLM's model runner, which knows the requests of the batch."""

    def __init__(self, runner: Any):
        super().__init__(logprobs_mode="raw_logprobs")
        self._runner = runner
        self._temperature_B: torch.Tensor | None = None

    def forward(self, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        self._temperature_B = None if sampling_metadata.all_greedy else sampling_metadata.temperature
        self._seed(sampling_metadata.generators)
        return super().forward(logits, sampling_metadata, *args, **kwargs)

    def compute_logprobs(self, logits: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Called on the logits (B, V), before anything is done to them."""
        logits = logits.float()
        if self._temperature_B is not None:
            temperature = self._temperature_B.where(self._temperature_B >= GREEDY_BELOW, 1.0)
            logits = logits / temperature[:, None]
        return logits.log_softmax(-1)

    def _seed(self, generators: dict[int, torch.Generator]) -> None:
        """From a request's seed and the place that is drawn: a response that was recalled goes on as it would have."""
        batch = self._runner.input_batch
        for row, generator in generators.items():
            seed = self._runner.requests[batch.req_ids[row]].sampling_params.seed
            place = f"{seed} {batch.num_tokens_no_spec[row]}".encode()
            generator.manual_seed(int.from_bytes(hashlib.blake2b(place, digest_size=8).digest()) >> 1)
