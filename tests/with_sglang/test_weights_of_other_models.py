"""Weights of models that SGLang lays out otherwise than the conformance suite's: experts, tied embeddings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from verl.engine.checkpoint_names import CheckpointNames
from verl.rollout.base import Request, SamplingParams
from verl.rollout.client import ClientEngine
from verl.rollout.sglang.arguments import SGLangSettings, installed
from verl.rollout.sglang.process import SGLangProcess

pytestmark = pytest.mark.skipif(not installed("sglang"), reason="SGLang is not installed (make sglang-cpu)")

SMALL = {
    "vocab_size": 100,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
EXPERTS = {
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "norm_topk_prob": True,
}


def tied() -> torch.nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=128, tie_word_embeddings=True))


def experts() -> torch.nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False))


@pytest.mark.parametrize(("make", "tensor_parallel"), [(tied, 2), (experts, 1)], ids=["tied, tp 2", "experts"])
def test_every_tensor_is_compared_by_its_name_and_one_that_differs_is_named(make, tensor_parallel, tmp_path: Path):
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    settings = SGLangSettings(
        str(tmp_path / "model"), "cpu", "float32", max_model_len=64, max_num_seqs=4, tensor_parallel=tensor_parallel
    )
    backend = SGLangProcess(settings, log=tmp_path / "sglang.log", bucket_bytes=30_000)
    try:
        engine = ClientEngine(backend, eos_token_ids=[1], max_model_len=64, vocab_size=100, no_weights="none yet")
        names = CheckpointNames(model)

        def stream():
            return names.stream((name, param.detach()) for name, param in model.named_parameters())

        asyncio.run(engine.update_weights(stream(), version=0))
        assert asyncio.run(engine.check_weights(stream())) == []
        for name, param in model.named_parameters():
            place = tuple(length // 2 for length in param.shape)
            kept = param.data[place].item()
            param.data[place] += 1.0
            (difference,) = asyncio.run(engine.check_weights(stream()))
            assert _same_tensor(difference.split()[0], name), (difference, name)
            param.data[place] = kept
        assert asyncio.run(engine.check_weights(stream())) == []

        request = Request("one", [5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True))
        (result,) = asyncio.run(engine.generate([request]))
        ids = torch.tensor([[5, 6, 7, *result.response_ids]])
        with torch.no_grad():
            log_probs = model(ids, use_cache=False).logits[0, 2:-1].float().log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(result.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=1e-4, rtol=0)
    finally:
        backend.close()


def _same_tensor(named: str, module_name: str) -> bool:
    """Fused experts have a name for each expert in the checkpoint."""
    if ".experts." in module_name:
        return named.startswith(module_name.rpartition(".")[0])
    return named == module_name
