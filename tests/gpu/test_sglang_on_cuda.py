"""The same job with SGLang on one GPU, the two taking turns in its memory."""

import json
import subprocess

import numpy as np
import pytest
import torch
from helpers import ROOT, arguments, command, metrics_of

from verl.rollout.sglang.arguments import SGLANG as ADAPTER

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not ADAPTER.installed, reason="SGLang is not installed"),
]

OFFLOAD = {
    f"{owner}__{part}_offload": True
    for owner in ("actor_rollout_ref__actor__fsdp_config", "critic__model__fsdp_config")
    for part in ("param", "optimizer")
}
SGLANG = {
    "actor_rollout_ref__rollout__name": "sglang",
    "actor_rollout_ref__rollout__gpu_memory_utilization": 0.4,
    "actor_rollout_ref__rollout__update_weights_bucket_megabytes": 64,
    "trainer__device": "cuda",
    "trainer__check_weights": "always",
    **OFFLOAD,
}
GIB = 1 << 30


def run(small, folder, **keys) -> list[dict[str, float]]:
    done = subprocess.run(
        command(arguments(small, folder, **{**SGLANG, **keys})), capture_output=True, text=True, cwd=ROOT
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
    """The GPU's use is sampled from outside. Awake, SGLang takes its share; training takes the rest."""
    samples = tmp_path / "samples.txt"
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--loop-ms=50"]
    with samples.open("w") as output, subprocess.Popen(query, stdout=output) as sampler:
        try:
            steps = run(small, tmp_path / "run", trainer__total_training_steps=3)
        finally:
            sampler.kill()
    peak = max(int(line) for line in samples.read_text().split()) / 1024
    asleep = steps[-1]["perf/device_memory_used_gb"]  # weights awake, KV cache asleep, actor offloaded
    reserved = max(step["perf/max_memory_reserved_gb"] for step in steps)
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    engine = 0.4 * total + 2  # its share, and CUDA's own
    buckets = 2 * 64 / 1024
    assert peak <= max(engine, asleep + reserved) + buckets + 2, (peak, engine, asleep, reserved)
    print(json.dumps({"peak": peak, "engine": engine, "between phases": asleep, "trainer reserved": reserved}))
