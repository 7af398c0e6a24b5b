"""The same job with SGLang on one GPU, the two taking turns in its memory."""

import json
import subprocess
from collections import defaultdict

import numpy as np
import pytest
import torch
from helpers import OFFLOAD, ROOT, arguments, command, make_model, metrics_of

from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed"),
]

KEYS = {
    "actor_rollout_ref__rollout__name": "sglang",
    "actor_rollout_ref__rollout__gpu_memory_utilization": 0.4,
    "actor_rollout_ref__rollout__update_weights_bucket_megabytes": 64,
    "trainer__device": "cuda",
    "trainer__check_weights": "always",
    **OFFLOAD,
}


def run(small, folder, **keys) -> list[dict[str, float]]:
    done = subprocess.run(
        command(arguments(small, folder, **{**KEYS, **keys})), capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return [step for step in metrics_of(folder) if step["step"] > 0]


def test_ppo_learns_with_equal_weights_at_every_step_and_no_growth_of_memory(small, tmp_path):
    keys = {"trainer__total_training_steps": 20, "actor_rollout_ref__actor__optim__lr": 5e-3}
    steps = run(small, tmp_path, **keys)
    scores = [step["critic/score/mean"] for step in steps]
    assert np.mean(scores[-3:]) > 3 * np.mean(scores[:3])
    assert max(step["training/rollout_log_probs_diff_mean"] for step in steps) < 0.05
    assert all(step["timing_s/check_weights"] > 0 for step in steps)
    used = [step["perf/device_memory_used_gb"] for step in steps]
    reserved = [step["perf/max_memory_reserved_gb"] for step in steps]
    assert abs(used[-1] - used[1]) < 0.05, used  # the first step loads kernels
    assert max(reserved[1:]) - reserved[1] < 0.05, reserved
    print(json.dumps({"used GiB, steps 1, 2, 20": [used[0], used[1], used[-1]], "score": [scores[0], scores[-1]]}))


def test_engine_and_trainer_never_hold_their_peaks_together(small, tmp_path):
    """What each process has on the GPU, as the driver counts it, sampled from outside. Alone, the trainer's phase takes
    some 7 GiB here (float32 weights, gradients and Adam's moments of 0.36 billion parameters), the engine's a fifth of
    the GPU."""
    make_model(
        tmp_path / "model",
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    keys = {
        "actor_rollout_ref__model__path": tmp_path / "model",
        "actor_rollout_ref__rollout__gpu_memory_utilization": 0.2,
        "actor_rollout_ref__rollout__max_num_seqs": 64,
        "trainer__total_training_steps": 3,
    }
    samples = tmp_path / "samples.csv"
    query = ["nvidia-smi", "--query-compute-apps=timestamp,pid,used_memory", "--format=csv,noheader,nounits"]
    with samples.open("w") as output, subprocess.Popen([*query, "--loop-ms=50"], stdout=output) as sampler:
        try:
            steps = run(small, tmp_path / "run", **keys)
        finally:
            sampler.kill()
    together: dict[str, float] = defaultdict(float)
    peaks: dict[str, float] = defaultdict(float)  # of each process
    for line in samples.read_text().splitlines():
        time, process, megabytes = (part.strip() for part in line.split(","))
        together[time] += float(megabytes) / 1024
        peaks[process] = max(peaks[process], float(megabytes) / 1024)
    figures = {"together": max(together.values()), "of each": sorted(peaks.values())}
    print(json.dumps(figures))
    larger, buckets = max(peaks.values()), 2 * 64 / 1024
    assert len(peaks) == 2, figures
    assert min(peaks.values()) > 4, figures  # or the next line would say nothing
    assert figures["together"] <= larger + buckets + 2, figures
    assert max(step["perf/max_memory_reserved_gb"] for step in steps) > 4
