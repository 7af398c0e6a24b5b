"""Replicas of an engine on the ranks of a job, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess

from helpers import ROOT, arguments, command, descendant, metrics_of, wait_for_steps

# How a process of an engine's second worker is called, and what an engine says of each batch or request.
SECOND_WORKER = {"sglang": "sglang::scheduler_TP1", "vllm": "VLLM::Worker_TP1"}
HAS_DRAWN = {"sglang": "Prefill batch", "vllm": "Added request"}

KEYS = {
    "trainer__device": "cpu",
    "trainer__n_gpus_per_node": 2,
    "trainer__check_weights": "always",
    "trainer__val_before_train": False,
    "actor_rollout_ref__rollout__max_num_seqs": 64,
    "actor_rollout_ref__actor__optim__lr": 5e-3,
}


def test_a_replica_of_two_ranks_that_dies_is_started_again_and_no_prompt_is_lost(engine, small, tmp_path):
    """The only one there is: its prompts wait for it."""
    keys = {
        **KEYS,
        "actor_rollout_ref__rollout__name": engine.name,
        "actor_rollout_ref__rollout__tensor_model_parallel_size": 2,
        "trainer__total_training_steps": 12,
        "trainer__rollout_data_dir": tmp_path / "rollouts",
    }
    output = tmp_path / "out.txt"
    with output.open("w") as file:
        run = subprocess.Popen(command(arguments(small, tmp_path / "run", **keys)), stdout=file, stderr=file, cwd=ROOT)
    try:
        wait_for_steps(run, tmp_path / "run", 2, lambda: output.read_text()[-4000:])
        os.kill(descendant(run, SECOND_WORKER[engine.name]).pid, signal.SIGKILL)
        assert run.wait(300) == 0, output.read_text()[-4000:]
    finally:
        run.kill()
    assert "replica 0 (ranks 0 to 1) is restarted" in output.read_text()
    assert (tmp_path / "run" / "rollout" / f"{engine.name}-0-start-2.log").exists()
    steps = metrics_of(tmp_path / "run")
    assert [step["step"] for step in steps] == list(range(1, 13))
    assert max(step["training/rollout_log_probs_diff_max"] for step in steps) < 1e-3
    for step in range(1, 13):
        lines = (tmp_path / "rollouts" / f"{step}.jsonl").read_text().splitlines()
        assert len({json.loads(line)["uid"] for line in lines}) == len(lines) == 16


def test_replicas_share_the_prompts_and_hold_the_actors_weights(engine, small, tmp_path):
    keys = {
        **KEYS,
        "actor_rollout_ref__rollout__name": engine.name,
        "trainer__total_training_steps": 2,
        "trainer__rollout_restarts": 0,
    }
    if engine.name == "vllm":
        keys["actor_rollout_ref__rollout__engine_kwargs__vllm__enable_log_requests"] = True
    done = subprocess.run(command(arguments(small, tmp_path, **keys)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "2 replicas of it" in done.stdout
    assert all(step["timing_s/check_weights"] > 0 for step in metrics_of(tmp_path))
    for replica in range(2):  # each has drawn
        assert HAS_DRAWN[engine.name] in (tmp_path / "rollout" / f"{engine.name}-{replica}.log").read_text()
