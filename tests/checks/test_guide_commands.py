"""The guide's two commands, as they stand there, with ``trainer.dry_run=True`` added: each prints its plan."""

# ruff: noqa: E501

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ONE_MACHINE = r"""
export SGL_DISABLE_TP_MEMORY_INBALANCE_CHECK=True
PYTHONUNBUFFERED=1 python3 -m verl.trainer.main_ppo \
    data.train_files=$HOME/data/gsm8k/train.parquet data.val_files=$HOME/data/gsm8k/test.parquet \
    data.train_batch_size=4096 data.max_prompt_length=4096 data.max_response_length=4096 \
    actor_rollout_ref.rollout.name=sglang actor_rollout_ref.model.path=Qwen/Qwen2-7B-Instruct \
    actor_rollout_ref.actor.optim.lr=1e-6 actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=8 \
    actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.gpu_memory_utilization=0.8 \
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu=4 \
    critic.optim.lr=1e-5 critic.model.path=Qwen/Qwen2-7B-Instruct critic.ppo_micro_batch_size_per_gpu=4 \
    critic.model.fsdp_config.param_offload=True critic.model.fsdp_config.optimizer_offload=True \
    algorithm.kl_ctrl.kl_coef=0.001 trainer.logger=['console'] trainer.val_before_train=False \
    trainer.default_hdfs_dir=null trainer.n_gpus_per_node=4 trainer.nnodes=1 trainer.save_freq=-1 trainer.test_freq=10 \
    trainer.total_epochs=15 trainer.dry_run=True 2>&1 | tee verl_demo.log
"""

TWO_MACHINES = r"""
python3 -m verl.trainer.main_ppo actor_rollout_ref.rollout.name=sglang \
    data.train_files=$DATA_DIR/train.parquet data.val_files=$DATA_DIR/test.parquet \
    data.train_batch_size=4096 data.max_prompt_length=4096 data.max_response_length=4096 \
    actor_rollout_ref.model.path=meta-llama/Llama-3.1-8B-Instruct actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.model.use_remove_padding=True actor_rollout_ref.actor.ppo_mini_batch_size=64 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=16 actor_rollout_ref.model.enable_gradient_checkpointing=True \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=16 actor_rollout_ref.rollout.tensor_model_parallel_size=16 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.8 actor_rollout_ref.rollout.free_cache_engine=True \
    actor_rollout_ref.ref.log_prob_micro_batch_size=16 actor_rollout_ref.ref.fsdp_config.param_offload=True \
    critic.optim.lr=1e-5 critic.model.use_remove_padding=True critic.model.path=meta-llama/Llama-3.1-8B-Instruct \
    critic.model.enable_gradient_checkpointing=True critic.ppo_micro_batch_size=16 \
    critic.model.fsdp_config.param_offload=True critic.model.fsdp_config.optimizer_offload=True \
    algorithm.kl_ctrl.kl_coef=0.001 trainer.critic_warmup=0 trainer.logger=['console'] trainer.val_before_train=True \
    trainer.default_hdfs_dir=null trainer.n_gpus_per_node=8 trainer.nnodes=2 trainer.save_freq=-1 trainer.test_freq=10 \
    trainer.total_epochs=15 trainer.dry_run=True 2>&1 | tee verl_demo.log
"""


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
