"""The main job with a real engine in a process of its own, on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess

import numpy as np
import psutil
import pytest
from helpers import ROOT, arguments, command, descendant, metrics_of, start, wait_for_steps

from verl.rollout.processes.adapter import Adapter

# What processes of an engine's workers are called.
WORKERS = {"sglang": "scheduler", "vllm": "VLLM::EngineCore"}


def rollout_with(engine: Adapter) -> dict[str, object]:
    return {"actor_rollout_ref__rollout__name": engine.name}


def test_ppo_learns_and_the_engines_weights_are_the_actors_at_every_step(engine, small, tmp_path):
    keys = {
        **rollout_with(engine),
        "trainer__total_training_steps": 15,
        "trainer__test_freq": 15,
        "trainer__check_weights": "always",
        "actor_rollout_ref__actor__optim__lr": 5e-3,
    }
    done = subprocess.run(command(arguments(small, tmp_path, **keys)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [step for step in metrics_of(tmp_path) if step["step"] > 0]
    scores = [step["critic/score/mean"] for step in steps]
    assert np.mean(scores[-3:]) > 3 * np.mean(scores[:3])
    assert max(step["training/rollout_log_probs_diff_max"] for step in steps) < 1e-3
    assert all(step["timing_s/check_weights"] > 0 for step in steps)
    assert f"{engine.title} 0." in done.stdout


def test_a_tensor_that_the_engine_got_wrong_ends_the_run_by_its_name(engine, small, tmp_path):
    script = tmp_path / "with_one_stale_tensor.py"
    script.write_text(
        "import itertools, sys\n"
        "from verl.trainer.main_ppo import main\n"
        "from verl.trainer.ppo.worker import PPOWorker\n"
        "weights, calls = PPOWorker.weights, itertools.count()\n"
        "def stale(self):\n"
        "    number = next(calls)  # update, check, update, ...\n"
        "    for name, tensor in weights(self):\n"
        "        yield name, tensor + (number == 2 and name == 'model.layers.1.mlp.up_proj.weight')\n"
        "PPOWorker.weights = stale\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    keys = {**rollout_with(engine), "trainer__check_weights": "always", "trainer__val_before_train": False}
    done = start(arguments(small, tmp_path / "run", **keys), script=script)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
    assert "after the weight update of step 1" in done.stderr
    assert "model.layers.1.mlp.up_proj.weight differs" in done.stderr
    assert done.stderr.count(" differs ") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("victim", ["worker", "engine"])
def test_the_death_of_the_engine_ends_the_run_with_a_message_and_leaves_no_process(engine, small, tmp_path, victim):
    keys = {**rollout_with(engine), "trainer__total_training_steps": 10000, "trainer__val_before_train": False}
    run = subprocess.Popen(
        command(arguments(small, tmp_path, **keys)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    started: list[psutil.Process] = []
    try:
        wait_for_steps(run, tmp_path, 3, run.communicate)
        process = descendant(run, engine.server)
        started = [process, *process.children(recursive=True)]
        workers = [child for child in started if WORKERS[engine.name] in " ".join(child.cmdline())]
        chosen = process if victim == "engine" else workers[0]
        os.kill(chosen.pid, signal.SIGKILL)
        _, stderr = run.communicate(timeout=60)
    finally:
        run.kill()
        for process in started:
            if process.is_running():
                process.kill()
    assert run.returncode == 1
    assert f"error: the {engine.title} engine (pid" in stderr
    assert "Its output is in" in stderr
    assert "\nTraceback" not in f"\n{stderr}"  # of ours; the engine's own words are indented
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
