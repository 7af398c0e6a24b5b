"""The guide's second command in small: two hosts, one device each; FSDP over both, and one SGLang on both."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT, arguments, metrics_of
from hosts import RAY, can_make_hosts, ray_on, two_hosts

from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = [
    pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed (make sglang-cpu)"),
    pytest.mark.skipif(can_make_hosts() is not None, reason=str(can_make_hosts())),
]

RECORDED = [sys.executable, str(ROOT / "tests" / "recorded.py")]
# What follows from the tokens alone, whoever computes it.
TRAINED = ("actor/pg_loss", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm", "actor/ppo_kl", "actor/entropy")


@pytest.mark.parametrize(("family", "steps"), [("ipv4", 15), ("ipv6", 3)])
def test_ppo_over_two_hosts_learns_with_one_engine_on_both_and_trains_as_one_process_does(
    small, tmp_path, family, steps
):
    keys = {
        "trainer__total_training_steps": steps,
        "trainer__test_freq": steps,
        "trainer__device": "cpu",
        "trainer__check_weights": "always",
        "actor_rollout_ref__rollout__name": "sglang",
        "actor_rollout_ref__rollout__max_num_seqs": 64,
        "actor_rollout_ref__rollout__tensor_model_parallel_size": 2,
        "actor_rollout_ref__actor__optim__lr": 5e-3,
    }
    over_both = arguments(small, tmp_path / "hosts", trainer__nnodes=2, trainer__n_gpus_per_node=1, **keys)
    with two_hosts(family, tmp_path) as hosts, ray_on(hosts) as environment:
        status = hosts[0].run([RAY, "status"], environment=environment).stdout
        assert status.count(" node_") == 2, status
        done = hosts[0].run([*RECORDED, "record", str(tmp_path / "rollouts"), *over_both], 400, environment)
        logs = "".join(path.read_text()[-2000:] for path in tmp_path.glob("hosts/r*/*.log"))
        assert done.returncode == 0, done.stdout[-4000:] + logs
    assert "starting 2 ranks on node0, node1" in done.stdout
    found = [step for step in metrics_of(tmp_path / "hosts") if step["step"] > 0]
    scores = [step["critic/score/mean"] for step in found]
    assert steps < 15 or np.mean(scores[-3:]) > 3 * np.mean(scores[:3])
    assert max(step["training/rollout_log_probs_diff_max"] for step in found) < 1e-3

    keys |= {"actor_rollout_ref__rollout__name": "hf", "actor_rollout_ref__rollout__tensor_model_parallel_size": 1}
    alone = arguments(small, tmp_path / "alone", **keys)
    again = subprocess.run(
        [*RECORDED, "replay", str(tmp_path / "rollouts"), *alone], capture_output=True, text=True, cwd=ROOT
    )
    assert again.returncode == 0, again.stderr[-3000:]
    for step, other in zip(metrics_of(tmp_path / "alone"), metrics_of(tmp_path / "hosts"), strict=True):
        tolerance = 1e-5 if step["step"] <= 3 else 1e-2  # Adam makes roundings grow from step to step
        for name in TRAINED if step["step"] else ():
            assert other[name] == pytest.approx(step[name], rel=tolerance, abs=1e-7), (name, step["step"])
