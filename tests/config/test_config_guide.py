# ruff: noqa: E501  (the commands are the guide's, line for line)
"""The guide's two commands, pasted into a shell as they are."""

import os
import subprocess

import pytest

from verl.config import load, report

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
    trainer.total_epochs=15 2>&1 | tee verl_demo.log
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
    trainer.total_epochs=15 2>&1 | tee verl_demo.log
"""


def typed_in_a_shell(command: str, folder) -> list[str]:
    """What python3 would be called with, module name left off, after the shell's own expansions."""
    script = 'python3() { printf "%s\\n" "${@:3}"; }\n' + command
    environment = {**os.environ, "HOME": "/home/user", "DATA_DIR": "/data"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture(params=[ONE_MACHINE, TWO_MACHINES], ids=["one machine", "two machines"])
def guide(request, tmp_path):
    arguments = typed_in_a_shell(request.param, tmp_path)
    loaded = load(arguments)
    assert not loaded.problems, report(loaded.problems)
    return arguments, loaded


def test_the_guides_commands_are_read_without_a_problem(guide):
    _, loaded = guide
    assert loaded.config.data.train_batch_size == 4096
    assert loaded.config.trainer.logger == ["console"]
    assert loaded.config.trainer.default_hdfs_dir is None
    assert loaded.config.algorithm.use_kl_in_reward is True
    assert loaded.config.actor_rollout_ref.actor.optim.lr == 1e-6


def test_each_key_of_the_commands_counts_as_set(guide):
    arguments, loaded = guide
    assert len(loaded.set_keys) == len(arguments)


def test_global_batch_sizes_of_the_second_command_are_one_a_rank(tmp_path):
    loaded = load(typed_in_a_shell(TWO_MACHINES, tmp_path))
    assert loaded.config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 1
    assert loaded.config.critic.ppo_micro_batch_size_per_gpu == 1
    assert loaded.config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 16
    assert len(loaded.notices) == 3  # two old batch sizes and the KL penalty


def test_the_supervised_trainer_has_its_own_keys(load_valid):
    from verl.config import SFTConfig

    loaded = load_valid("data.train_batch_size=8", "optim.lr=1e-3", required=("model.path=m",), schema=SFTConfig)
    assert loaded.config.model.tokenizer_path == "m"
    assert loaded.config.optim.lr == 1e-3
    assert loaded.config.trainer.default_local_dir == "checkpoints/verl/sft"
