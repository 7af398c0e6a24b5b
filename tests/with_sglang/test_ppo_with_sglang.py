"""The main job with the real SGLang generating, on the CPU."""

from __future__ import annotations

import os
import signal
import subprocess

import numpy as np
import psutil
import pytest
from helpers import ROOT, arguments, command, metrics_of, start, wait_for_steps
from live_server import Server

from verl.rollout.sglang.arguments import installed

pytestmark = pytest.mark.skipif(not installed("sglang"), reason="SGLang is not installed (make sglang-cpu)")

SGLANG = {"actor_rollout_ref__rollout__name": "sglang", "actor_rollout_ref__rollout__max_num_seqs": 64}


def descendants_named(process: subprocess.Popen, name: str) -> list[psutil.Process]:
    return [
        child for child in psutil.Process(process.pid).children(recursive=True) if name in " ".join(child.cmdline())
    ]


def test_ppo_learns_with_sglang_and_its_weights_are_the_actors_at_every_step(small, tmp_path):
    keys = {
        **SGLANG,
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
    assert "SGLang 0.5" in done.stdout


def test_sglang_is_put_to_sleep_and_woken_in_an_order_that_it_stands(small, tmp_path):
    """On a CPU SGLang has no memory to give back, but it keeps account: an order that makes no sense crashes it."""
    script = tmp_path / "with_sleep.py"
    script.write_text(
        "import dataclasses, sys\n"
        "import torch\n"
        "from verl.rollout.sglang.process import SGLangProcess\n"
        "from verl.trainer.main_ppo import main\n"
        "start = SGLangProcess.__init__\n"
        "def sleeping(self, *args, **kwargs):\n"
        "    start(self, *args, **kwargs)\n"
        "    tags = frozenset({'weights', 'kv_cache'})\n"
        "    self.capabilities = dataclasses.replace(self.capabilities, sleep=tags)\n"
        "SGLangProcess.__init__ = sleeping\n"
        "torch.cuda.mem_get_info = lambda device: (1 << 40, 1 << 40)\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    keys = {**SGLANG, "trainer__check_weights": "always", "trainer__test_freq": 2, "trainer__save_freq": 2}
    done = start(arguments(small, tmp_path / "run", **keys), script=script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    steps = metrics_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert all(step["timing_s/sleep"] > 0 and step["timing_s/wake"] > 0 for step in steps[1:])


def test_a_tensor_that_the_engine_got_wrong_ends_the_run_by_its_name(small, tmp_path):
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
    keys = {**SGLANG, "trainer__check_weights": "always", "trainer__val_before_train": False}
    done = start(arguments(small, tmp_path / "run", **keys), script=script)
    assert done.returncode == 1, done.stdout[-2000:] + done.stderr[-3000:]
    assert "after the weight update of step 1" in done.stderr
    assert "model.layers.1.mlp.up_proj.weight differs" in done.stderr
    assert done.stderr.count(" differs ") == 1
    assert "Traceback" not in done.stderr


def test_ppo_learns_with_a_server_that_was_started_elsewhere(small, tmp_path):
    server = Server(small / "model", key="a key of this test", log=tmp_path / "server.log")
    try:
        server.wait()
        keys = {
            **SGLANG,
            "actor_rollout_ref__rollout__mode": "server",
            "actor_rollout_ref__rollout__server_urls": f"[{server.url}]",
            "actor_rollout_ref__rollout__server_api_key_env": "TEST_SERVER_KEY",
            "trainer__total_training_steps": 15,
            "trainer__check_weights": "always",
            "actor_rollout_ref__actor__optim__lr": 5e-3,
        }
        done = subprocess.run(
            command(arguments(small, tmp_path / "run", **keys)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "TEST_SERVER_KEY": "a key of this test"},
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        scores = [step["critic/score/mean"] for step in metrics_of(tmp_path / "run") if step["step"] > 0]
        assert np.mean(scores[-3:]) > 3 * np.mean(scores[:3])
        assert "a key of this test" not in (tmp_path / "run" / "config.yaml").read_text() + done.stdout + done.stderr
    finally:
        server.kill()


@pytest.mark.parametrize("victim", ["scheduler", "engine"])
def test_the_death_of_sglang_ends_the_run_with_a_message_and_leaves_no_process(small, tmp_path, victim):
    keys = {**SGLANG, "trainer__total_training_steps": 10000, "trainer__val_before_train": False}
    run = subprocess.Popen(
        command(arguments(small, tmp_path, **keys)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    started: list[psutil.Process] = []
    try:
        wait_for_steps(run, tmp_path, 3, run.communicate)
        (engine,) = descendants_named(run, "verl.rollout.sglang.server")
        started = [engine, *engine.children(recursive=True)]
        schedulers = [child for child in started if "scheduler" in " ".join(child.cmdline())]
        chosen = engine if victim == "engine" else schedulers[0]
        os.kill(chosen.pid, signal.SIGKILL)
        _, stderr = run.communicate(timeout=60)
    finally:
        run.kill()
        for process in started:
            if process.is_running():
                process.kill()
    assert run.returncode == 1
    assert "error: the SGLang engine (pid" in stderr
    assert "Its output is in" in stderr
    assert "Traceback" not in stderr
    _, alive = psutil.wait_procs(started, timeout=10)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
