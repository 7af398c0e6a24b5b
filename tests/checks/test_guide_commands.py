"""The guide's two commands, as they stand there, with ``trainer.dry_run=True`` added: each prints its plan."""

# ruff: noqa: E501

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import guide
import pytest


def planned(command: str) -> str:
    """The command with a dry run asked for, and nothing else changed."""
    return command.replace("trainer.total_epochs=15", "trainer.total_epochs=15 trainer.dry_run=True")


ONE_MACHINE, TWO_MACHINES = planned(guide.ONE_MACHINE), planned(guide.TWO_MACHINES)


@pytest.fixture
def paste(gsm8k, tmp_path):
    """Run a command in bash with an empty home that holds GSM8K and nothing else; its printed plan, wrapped lines and
    columns made single spaces."""
    home = tmp_path / "home"
    shutil.copytree(gsm8k, home / "data" / "gsm8k")
    project = Path(__file__).resolve().parents[2]
    environment = {
        "HOME": str(home),
        "DATA_DIR": str(home / "data" / "gsm8k"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(project),
        # any request to the hub or elsewhere would fail
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }

    def run(command: str) -> str:
        done = subprocess.run(
            ["bash", "-c", f"set -o pipefail\n{command}"], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "verl_demo.log").read_text() == done.stdout
        return " ".join(done.stdout.split())

    return run


def test_the_one_machine_command_prints_its_plan(paste):
    plan = paste(ONE_MACHINE)
    for words in (
        "4 GPUs (1 × 4 a node)",
        "builds critic algorithm.adv_estimator=gae",
        "builds reference KL penalty in the reward",
        "sglang, 2 replicas of 2 GPUs each",
        "context 8,192 tokens",
        "prompts 4,096 trajectories 4,096",
        "old log-probs per rank 1,024 sequences = 128 micro-batches of 8",
        "reference log-probs per rank 1,024 sequences = 256 micro-batches of 4",
        "values per rank 1,024 sequences = 256 micro-batches of 4",
        "actor update 64 optimizer steps: 64 mini-batches of 64 prompts per rank and mini-batch 16 sequences = 4 micro-batches of 4",
        "training rows 7,473 steps an epoch 1, 3,377 rows left out of each steps 15 (15 epochs)",
        "optimizer steps actor 960, critic 960",
        "validation at steps 10, 15 (1,319 prompts)",
        "checkpoints never",
        "algorithm.use_kl_in_reward=True, because algorithm.kl_ctrl.kl_coef is set",
        "Qwen/Qwen2-7B-Instruct: not in the local hub cache",
        "No problem found",
    ):
        assert words in plan
    assert "has no effect" not in plan


def test_the_two_machine_command_prints_its_plan_with_its_micro_batch_capped(paste):
    plan = paste(TWO_MACHINES)
    for words in (
        "16 GPUs (2 × 8 a node)",
        "sglang, 1 replica of 16 GPUs each",
        "old log-probs per rank 256 sequences = 16 micro-batches of 16",
        "reference log-probs per rank 256 sequences = 256 micro-batches of 1",
        "values per rank 256 sequences = 256 micro-batches of 1",
        "per rank and mini-batch 4 sequences = 1 micro-batch of 4 (capped, 16 was asked for)",
        "critic update 64 optimizer steps: 64 mini-batches of 64 prompts per rank and mini-batch 4 sequences = 4 micro-batches of 1",
        "steps 15 (15 epochs)",
        "validation before training and at steps 10, 15 (1,319 prompts)",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu: 4 instead of 16",
        "actor_rollout_ref.ref.log_prob_micro_batch_size=16 is the old form",
        "critic.ppo_micro_batch_size=16 is the old form",
        "No problem found",
    ):
        assert words in plan
