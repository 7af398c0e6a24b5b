"""The recipes for GPUs in examples/, as they stand there, with ``trainer.dry_run=True`` added: each prints its plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = {
    "ppo_gsm8k_qwen2.5_1.5b_1gpu.sh": (
        "one GPU, everything in this process",
        "builds critic algorithm.adv_estimator=gae",
        "sglang, 1 replica, on",
        "trajectories 512 (1 response",
        "actor update 4 optimizer steps: 4 mini-batches of 128 prompts",
        "in micro-batches of up to 32,768 tokens",
        "steps an epoch 14,",
    ),
    "grpo_gsm8k_qwen2.5_7b_4gpu.sh": (
        "4 GPUs (1 × 4 a node)",
        "advantages grpo",
        "sglang, 2 replicas of 2 GPUs each",
        "trajectories 2,048 (8 responses",
        "actor update 4 optimizer steps: 4 mini-batches of 64 prompts",
        "in micro-batches of up to 16,384 tokens",
    ),
    "grpo_gsm8k_qwen2.5_1.5b_1gpu_vllm.sh": (
        "one GPU, everything in this process",
        "advantages grpo",
        "vllm, 1 replica, on",
        "trajectories 1,024 (8 responses",
        "actor update 4 optimizer steps: 4 mini-batches of 32 prompts",
    ),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_prints_its_plan_and_nothing_is_wrong_with_it(recipe, gsm8k, make_model, tmp_path):
    model = make_model(tmp_path / "model", max_positions=32768)
    environment = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(
        ["bash", PROJECT / "examples" / recipe, "trainer.dry_run=True"],
        env={**environment, "DATA": str(gsm8k), "MODEL": str(model)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    plan = " ".join(done.stdout.split())
    assert done.returncode == 0, done.stdout + done.stderr
    for words in (*RECIPES[recipe], "builds reference KL term", "No problem found"):
        assert words in plan
    assert "has no effect" not in plan
    assert "Warnings" not in plan


def test_every_recipe_is_tested_and_in_the_readme():
    recipes = {path.name for path in (PROJECT / "examples").glob("*gpu*.sh")}
    assert recipes == set(RECIPES)
    readme = (PROJECT / "README.md").read_text()
    assert all(f"examples/{recipe}" in readme for recipe in recipes)


def test_every_recipe_says_whether_it_has_been_run():
    for recipe in RECIPES:
        head = (PROJECT / "examples" / recipe).read_text().split("\n#\n")[0]
        assert "# Not run by us" in head
        assert "docs/performance.md" in head
