"""The main job with SGLang, in what is SGLang's own."""

from __future__ import annotations

import os
import subprocess

import numpy as np
import pytest
from helpers import ROOT, arguments, command, metrics_of, start
from live_server import Server

from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed (make sglang-cpu)")

KEYS = {"actor_rollout_ref__rollout__name": "sglang", "actor_rollout_ref__rollout__max_num_seqs": 64}


def test_sglang_is_put_to_sleep_and_woken_in_an_order_that_it_stands(small, tmp_path):
    """On a CPU SGLang has no memory to give back, but it keeps account: an order that makes no sense crashes it."""
    script = tmp_path / "with_sleep.py"
    script.write_text(
        "import dataclasses, sys\n"
        "import torch\n"
        "from verl.rollout.processes.subprocess_backend import SubprocessBackend\n"
        "from verl.trainer.main_ppo import main\n"
        "start = SubprocessBackend.__init__\n"
        "def sleeping(self, *args, **kwargs):\n"
        "    start(self, *args, **kwargs)\n"
        "    tags = frozenset({'weights', 'kv_cache'})\n"
        "    self.capabilities = dataclasses.replace(self.capabilities, sleep=tags)\n"
        "SubprocessBackend.__init__ = sleeping\n"
        "torch.cuda.mem_get_info = lambda device: (1 << 40, 1 << 40)\n"
        "if __name__ == '__main__':\n"
        "    sys.exit(main())\n"
    )
    keys = {**KEYS, "trainer__check_weights": "always", "trainer__test_freq": 2, "trainer__save_freq": 2}
    done = start(arguments(small, tmp_path / "run", **keys), script=script)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    steps = metrics_of(tmp_path / "run")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert all(step["timing_s/sleep"] > 0 and step["timing_s/wake"] > 0 for step in steps[1:])


def test_ppo_learns_with_a_server_that_was_started_elsewhere(small, tmp_path):
    server = Server(small / "model", key="a key of this test", log=tmp_path / "server.log")
    try:
        server.wait()
        keys = {
            **KEYS,
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
