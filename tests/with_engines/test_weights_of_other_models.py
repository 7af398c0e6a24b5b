"""Weights of models that engines lay out otherwise than the conformance suite's: experts, tied embeddings."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from verl.engine.checkpoint_names import CheckpointNames
from verl.errors import UserError
from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import Request, SamplingParams
from verl.rollout.processes.adapter import EngineSettings
from verl.rollout.processes.subprocess_backend import SubprocessBackend

SMALL = {
    "vocab_size": 100,
    "hidden_size": 128,
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
    "head_dim": 32,
    "norm_topk_prob": True,
}


def tied() -> torch.nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**SMALL, intermediate_size=128, tie_word_embeddings=True))


def experts() -> torch.nn.Module:
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False))


@pytest.mark.parametrize(("make", "tensor_parallel"), [(tied, 2), (experts, 1)], ids=["tied, tp 2", "experts"])
def test_every_tensor_is_compared_by_its_name_and_one_that_differs_is_named(
    engine, make, tensor_parallel, tmp_path: Path
):
    if engine.name == "vllm" and make is experts:
        pytest.skip("refused on a CPU, as the next test says")
    torch.manual_seed(0)
    model = make().eval()
    model.save_pretrained(tmp_path / "model")
    settings = EngineSettings(
        str(tmp_path / "model"), "cpu", "float32", max_model_len=64, max_num_seqs=4, tensor_parallel=tensor_parallel
    )
    backend = SubprocessBackend(engine, settings, log=tmp_path / "engine.log", bucket_bytes=30_000)
    try:
        client = ClientEngine(backend, eos_token_ids=[1], max_model_len=64, vocab_size=100, no_weights="none yet")
        names = CheckpointNames(model)

        def stream():
            return names.stream((name, param.detach()) for name, param in model.named_parameters())

        asyncio.run(client.update_weights(stream(), version=0))
        assert asyncio.run(client.check_weights(stream())) == []
        for name, param in model.named_parameters():
            place = tuple(length // 2 for length in param.shape)
            kept = param.data[place].item()
            param.data[place] += 1.0
            (difference,) = asyncio.run(client.check_weights(stream()))
            assert _same_tensor(difference.split()[0], name), (difference, name)
            param.data[place] = kept
        assert asyncio.run(client.check_weights(stream())) == []

        request = Request("one", [5, 6, 7], SamplingParams(max_new_tokens=20, ignore_eos=True))
        (result,) = asyncio.run(client.generate([request]))
        ids = torch.tensor([[5, 6, 7, *result.response_ids]])
        with torch.no_grad():
            log_probs = model(ids, use_cache=False).logits[0, 2:-1].float().log_softmax(-1)
        expected = log_probs.gather(-1, torch.tensor(result.response_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(result.log_probs), expected, atol=1e-4, rtol=0)
    finally:
        backend.close()


def test_a_model_that_vllm_packs_as_it_loads_it_is_refused_by_name(engine, tmp_path: Path):
    if engine.name != "vllm":
        pytest.skip("vLLM alone does so")
    experts().save_pretrained(tmp_path / "model")
    settings = EngineSettings(str(tmp_path / "model"), "cpu", "float32", max_model_len=64, max_num_seqs=4)
    with pytest.raises(UserError, match="packs experts"):
        SubprocessBackend(engine, settings, log=tmp_path / "engine.log", bucket_bytes=30_000)


def test_an_argument_that_the_engine_does_not_have_is_refused_with_the_nearest(engine, tmp_path: Path):
    name, wrong = {"sglang": ("page_size", "pge_size"), "vllm": ("block_size", "blok_size")}[engine.name]
    settings = EngineSettings(str(tmp_path), "cpu", "float32", max_model_len=64, extra={wrong: 16})
    with pytest.raises(UserError, match=rf"{engine.name}\.{wrong}: .* no such argument; the nearest is {name}"):
        SubprocessBackend(engine, settings, log=tmp_path / "engine.log")


def _same_tensor(named: str, module_name: str) -> bool:
    """Fused experts have a name for each expert in the checkpoint."""
    if ".experts." in module_name:
        return named.startswith(module_name.rpartition(".")[0])
    return named == module_name
