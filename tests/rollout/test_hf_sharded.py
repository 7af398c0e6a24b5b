"""The embedded engine over a module that FSDP shards over two ranks."""

from __future__ import annotations

import asyncio

import pytest
import torch
from forks import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from verl.rollout.contract.base import IllegalState, Request, SamplingParams
from verl.rollout.embedded.engine import HFEngine


class Policy(nn.Module):
    """A root of sharding around the model, as a trainer has it."""

    def __init__(self, hf: Qwen2ForCausalLM):
        super().__init__()
        self.hf = hf

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.hf(input_ids=ids, use_cache=False).logits


def whole_policy() -> Policy:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        initializer_range=0.15,
    )
    return Policy(Qwen2ForCausalLM(config))


def make_engine(policy: Policy) -> HFEngine:
    return HFEngine(policy.hf, root=policy, eos_token_ids=[1], max_model_len=100, max_num_seqs=3)


def train(policy: Policy) -> torch.Tensor:
    """The gradient's norm after one backward."""
    policy(torch.arange(20)[None]).square().mean().backward()
    grads = [
        param.grad.full_tensor() if isinstance(param.grad, DTensor) else param.grad for param in policy.parameters()
    ]
    policy.zero_grad()
    return torch.stack([grad.norm() for grad in grads]).norm()


def generate_and_train(rank: int, world_size: int) -> None:
    """Rank 0 has nothing to generate, then little; rank 1 has much. No rank waits for the other in between."""
    reference = whole_policy()
    policy = whole_policy()
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in policy.hf.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    engine, plain = make_engine(policy), make_engine(reference)
    for counts in ((0, 7), (1, 5)):
        requests = [
            Request(str(index), [3 + index] * (2 + index), SamplingParams(max_new_tokens=5 + 40 * rank, seed=index))
            for index in range(counts[rank])
        ]
        with engine.whole_weights():
            found = [asyncio.run(engine.generate([request])) for request in requests]
            found.append(asyncio.run(engine.generate(requests)))
        expected = [asyncio.run(plain.generate([request])) for request in requests]
        expected.append(asyncio.run(plain.generate(requests)))
        assert [[result.response_ids for result in results] for results in found] == [
            [result.response_ids for result in results] for results in expected
        ]
        assert all(isinstance(param, DTensor) for param in policy.parameters())
        torch.testing.assert_close(train(policy), train(reference))
    with pytest.raises(IllegalState, match="whole_weights"):
        asyncio.run(engine.generate([Request("late", [5], SamplingParams(max_new_tokens=9))]))


def test_ranks_with_other_numbers_and_lengths_of_requests_do_not_wait_for_each_other():
    run_ranks(2, generate_and_train)


def test_without_sharding_whole_weights_changes_nothing():
    policy = whole_policy()
    engine = make_engine(policy)
    request = Request("0", [5, 6], SamplingParams(max_new_tokens=10))
    expected = asyncio.run(engine.generate([request]))
    with engine.whole_weights():
        assert asyncio.run(engine.generate([request])) == expected
