"""Tokens per second of the embedded engine against bare ``model.generate``, on the same requests.

    python benchmarks/rollout_hf.py [--rounds 5] [--threads 2] [--max-num-seqs 64]

Both draw at temperature 1 with the same number of tokens per request, set by each request's max_new_tokens.
``model.generate`` takes the requests in batches of max_num_seqs, in order; a batch lasts as long as its longest.
Rounds alternate between the two; the table gives medians. A 0.9-million-parameter Qwen2 in fp32.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.rollout.contract.base import Request, SamplingParams
from verl.rollout.embedded.engine import HFEngine

VOCABULARY = 512
Runner = Callable[[Qwen2ForCausalLM, list[Request], int], int]
PAD, EOS = 0, 1  # no request stops at EOS: lengths are the requests' own


def build_model() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return Qwen2ForCausalLM(config).eval()


def make_requests(kind: str, count: int, rng: np.random.Generator) -> list[Request]:
    """equal: prompts of 64 tokens, responses of 64. ragged: prompts of 32-96, log-normal responses of at most 256."""
    if kind == "equal":
        prompts, responses = np.full(count, 64), np.full(count, 64)
    else:
        prompts = rng.integers(32, 97, count)
        responses = np.clip(rng.lognormal(4.0, 0.7, count).astype(int), 4, 256)
    return [
        Request(
            str(index),
            rng.integers(2, VOCABULARY, prompts[index]).tolist(),
            SamplingParams(max_new_tokens=int(responses[index]), ignore_eos=True, seed=index),
        )
        for index in range(count)
    ]


def run_engine(model: Qwen2ForCausalLM, requests: list[Request], max_num_seqs: int) -> int:
    engine = HFEngine(model, eos_token_ids=[EOS], max_model_len=1024, max_num_seqs=max_num_seqs)

    async def episodes() -> list:
        return await asyncio.gather(*(engine.generate([request]) for request in requests))

    return sum(len(result.response_ids) for (result,) in asyncio.run(episodes()))


def run_generate(model: Qwen2ForCausalLM, requests: list[Request], batch_size: int) -> int:
    useful = 0
    for start in range(0, len(requests), batch_size):
        batch = requests[start : start + batch_size]
        longest = max(len(request.prompt_ids) for request in batch)
        ids = torch.full((len(batch), longest), PAD)
        mask = torch.zeros_like(ids)
        for row, request in enumerate(batch):
            ids[row, longest - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, longest - len(request.prompt_ids) :] = 1
        wanted = [request.sampling.max_new_tokens for request in batch]
        model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(wanted),
            min_new_tokens=max(wanted),
        )
        useful += sum(wanted)
    return useful


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--requests", type=int, default=128, help="of the ragged case; the equal one has max-num-seqs")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = build_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {args.threads} threads")
    print(f"{'lengths':8} {'requests':>8} {'engine':>10} {'generate':>10} {'ratio':>6}   (useful tokens/s, medians)")
    for kind, count in (("equal", args.max_num_seqs), ("ragged", args.requests)):
        requests = make_requests(kind, count, np.random.default_rng(0))
        speeds: dict[Runner, list[float]] = {run_engine: [], run_generate: []}
        for _ in range(args.rounds + 1):  # the first round warms up
            for run, runs in speeds.items():
                start = time.perf_counter()
                tokens = run(model, requests, args.max_num_seqs)
                runs.append(tokens / (time.perf_counter() - start))
        engine, generate = (statistics.median(runs[1:]) for runs in speeds.values())
        print(f"{kind:8} {count:8} {engine:10.0f} {generate:10.0f} {engine / generate:6.2f}")


if __name__ == "__main__":
    main()
