"""Ranks that share a model over NCCL, and the job with them, on two GPUs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_helpers import BATCHING, VOCAB, loss, save_model, table
from forks import run_ranks
from helpers import OFFLOAD, arguments, metrics_of, start
from safetensors.torch import load_file

from verl.config.sections.parts import FSDPConfig, ModelConfig, OptimConfig
from verl.engine import TrainEngine
from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

NCCL = "cpu:gloo,cuda:nccl"


def build(path: str, **fsdp) -> TrainEngine:
    optim = OptimConfig(lr=1e-3, eps=1e-5)
    return TrainEngine(ModelConfig(path=path), "policy", FSDPConfig(**fsdp), optim_config=optim, device="cuda")


def streamed_and_moved(rank: int, world_size: int, path: str):
    """Each tensor, and the largest number of bytes that a stream took on this GPU."""
    engine = build(path, param_offload=True)
    engine.offload(params=True)
    engine.onload(params=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = [(name, str(tensor.dtype), tensor.float().cpu().numpy()) for name, tensor in engine.weights()]
    return found, torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before


def test_both_ranks_stream_what_the_file_holds_a_layer_at_a_time(tmp_path):
    path = save_model(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for found, most, left in run_ranks(2, streamed_and_moved, path, backend=NCCL):
        assert {name for name, _, _ in found} == held.keys()
        for name, dtype, values in found:
            assert dtype == "torch.bfloat16"
            assert torch.equal(torch.from_numpy(values), held[name].bfloat16().float()), name
        assert left == 0
        assert most < sum(2 * tensor.numel() for tensor in held.values())


def updates(rank: int, world_size: int, path: str, settings: dict, moved: bool):
    """moved: everything is on the host before each stage, of log-probs, which change nothing, or of an update. Gives
    metrics, log-probs and how far the weights went."""
    rows = table()
    share = rows.slice(rank * len(rows) // world_size, len(rows) // world_size)
    engine = build(path, **settings)
    before = [tensor.float() for _, tensor in engine.weights()]

    def stage():
        if moved:
            engine.offload(params=True, optimizer=True)
            engine.onload(params=True, optimizer=True)
        return engine

    metrics, log_probs = [], []
    for _ in range(3):
        log_probs += stage().log_probs(share, temperature=1.0, batching=BATCHING)["log_probs"].to_pylist()
        metrics.append(stage().update(share, loss, batching=BATCHING))
    went = [tensor.float() - start for (_, tensor), start in zip(stage().weights(), before, strict=True)]
    return metrics, log_probs, torch.cat([each.flatten() for each in went]).cpu().numpy()


@pytest.mark.parametrize("settings", [{}, {"optimizer_offload": True}, {"use_torch_compile": False}], ids=str)
def test_two_ranks_train_as_one_gpu_does(tmp_path, settings):
    path = save_model(tmp_path)
    ((expected, _, whole),) = run_ranks(1, updates, path, settings, False, backend=NCCL)
    for metrics, _, went in run_ranks(2, updates, path, settings, False, backend=NCCL):
        for name in ("loss", "grad_norm"):
            of_two, of_one = ([each[name] for each in steps] for steps in (metrics, expected))
            assert of_two == pytest.approx(of_one, rel=0.05, abs=0.02), name
        # the first steps of AdamW are of the gradients' signs, which rounding decides where they are small
        assert np.linalg.norm(went - whole) < 0.3 * np.linalg.norm(whole)


def test_shards_that_are_elsewhere_between_stages_train_bitwise_as_those_that_stay(tmp_path):
    """One rank has one word less of the vocabulary, which FSDP pads."""
    path = save_model(tmp_path, vocab_size=VOCAB + 1)
    moved, still = (run_ranks(2, updates, path, {}, there, backend=NCCL) for there in (True, False))
    for one, other in zip(moved, still, strict=True):
        assert one[:2] == other[:2]
        assert np.array_equal(one[2], other[2])


@pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed")
@pytest.mark.parametrize("group", [1, 2], ids=["an engine for each rank", "a tensor-parallel engine"])
def test_the_job_learns_with_sglang_on_two_gpus(small, tmp_path, monkeypatch, group):
    monkeypatch.delenv("SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK", raising=False)
    keys = {
        "actor_rollout_ref__rollout__name": "sglang",
        "actor_rollout_ref__rollout__gpu_memory_utilization": 0.3,
        "actor_rollout_ref__rollout__max_num_seqs": 64,
        "actor_rollout_ref__rollout__tensor_model_parallel_size": group,
        "actor_rollout_ref__actor__optim__lr": 5e-3,
        "trainer__device": "cuda",
        "trainer__n_gpus_per_node": 2,
        "trainer__check_weights": "always",
        "trainer__total_training_steps": 15,
        **OFFLOAD,
    }
    done = start(arguments(small, tmp_path, **keys))
    logs = "".join(log.read_text()[-1500:] for log in Path(tmp_path).glob("ranks/*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:] + logs
    steps = [step for step in metrics_of(tmp_path) if step["step"] > 0]
    scores = [step["critic/score/mean"] for step in steps]
    assert np.mean(scores[-3:]) > 3 * np.mean(scores[:3]), scores
    assert all(step["timing_s/check_weights"] > 0 for step in steps)
