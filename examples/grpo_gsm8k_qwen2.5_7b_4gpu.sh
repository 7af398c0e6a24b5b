#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2.5-7B-Instruct, on one machine with four GPUs of 80 GB, SGLang generating on two at a time.
# Not run by us. Of a 7B model only single updates and forwards were measured, on one H100 (docs/performance.md).
#
#   bash examples/grpo_gsm8k_qwen2.5_7b_4gpu.sh [key=value ...]
#
# Install: pip install -e ".[sglang,data]". Data: python3 examples/data_preprocess/gsm8k.py.
# With trainer.dry_run=True it prints its plan, on any machine.
# Weights and optimizer (91 GB) are sharded over the four ranks and wait in host memory while they are not in use, so
# that SGLang can have most of each GPU. Eight responses to each prompt are compared with each other; there is no critic.
set -euo pipefail
PYTHON=${PYTHON:-python3}
DATA=${DATA:-$HOME/data/gsm8k}
MODEL=${MODEL:-Qwen/Qwen2.5-7B-Instruct}

"$PYTHON" -m verl.trainer.main_ppo \
    data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" \
    data.train_batch_size=256 data.max_prompt_length=512 data.max_response_length=1024 \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.rollout.name=sglang actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.tensor_model_parallel_size=2 actor_rollout_ref.rollout.gpu_memory_utilization=0.7 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.ppo_mini_batch_size=64 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    trainer.device=cuda trainer.n_gpus_per_node=4 \
    trainer.total_epochs=5 trainer.test_freq=10 trainer.save_freq=20 trainer.max_ckpt_to_keep=2 \
    trainer.project_name=gsm8k trainer.experiment_name=grpo_qwen2.5_7b "$@"
