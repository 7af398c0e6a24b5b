"""benchmarks/multi_gpu.py, which is for several GPUs, on two CPU ranks."""

import os
import re
import subprocess
import sys

import pytest
from helpers import ROOT

from verl.rollout.engines.sglang.arguments import SGLANG

pytestmark = pytest.mark.skipif(not SGLANG.installed, reason="SGLang is not installed (make sglang-cpu)")


def test_the_steps_of_a_tensor_parallel_group_run_and_their_weights_are_compared():
    script = ROOT / "benchmarks" / "multi_gpu.py"
    sizes = ["--shape", "tiny", "--prompts", "4", "--lengths", "64", "16", "--steps", "2", "--parts", "train,one"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, "--device", "cpu", *sizes]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout.count("weights of 2 steps compared on all ranks") == 2
    assert re.search(r"tokens a second and GPU: [\d,]+ on 1\nand [\d,]+ on 2, one engine on all: [\d.]+%", done.stdout)
    parts = ("arrive", "close", "gather", "load", "model", "open", "room", "wait")
    assert re.search("of it, s: " + ", ".join(rf"{part} [\d.]+" for part in parts), done.stdout)
    assert re.search(r"free when the engine starts, GB: TP0 [\d.]+, TP1 [\d.]+; spread", done.stdout)
    for stage in ("gen", "update_actor", "update_critic", "update_weights"):
        assert re.search(rf"^{stage} +[\d.]+", done.stdout, re.M)
