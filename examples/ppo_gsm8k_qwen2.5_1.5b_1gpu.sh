#!/usr/bin/env bash
# PPO with a critic on GSM8K with Qwen2.5-1.5B-Instruct, on one GPU of 80 GB, SGLang generating.
# Not run by us as it stands. Measured on one H100 were steps of this shape and these sizes, with random weights and all
# responses 1024 tokens long: 79 s, at most 32.8 GB of GPU memory for the trainer (docs/performance.md).
#
#   bash examples/ppo_gsm8k_qwen2.5_1.5b_1gpu.sh [key=value ...]
#
# Install: pip install -e ".[sglang,data]". Data: python3 examples/data_preprocess/gsm8k.py.
# With trainer.dry_run=True it prints its plan, on any machine.
# Weights and optimizers wait in host memory while they are not in use. Packed sequences, compiled layers and bfloat16
# with float32 master weights are the defaults on a GPU.
set -euo pipefail
PYTHON=${PYTHON:-python3}
DATA=${DATA:-$HOME/data/gsm8k}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}

"$PYTHON" -m verl.trainer.main_ppo \
    data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" \
    data.train_batch_size=512 data.max_prompt_length=512 data.max_response_length=1024 \
    actor_rollout_ref.rollout.name=sglang \
    actor_rollout_ref.model.path="$MODEL" critic.model.path="$MODEL" \
    actor_rollout_ref.actor.ppo_mini_batch_size=128 \
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768 critic.ppo_max_token_len_per_gpu=32768 \
    actor_rollout_ref.actor.optim.lr=1e-6 critic.optim.lr=1e-5 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    critic.model.fsdp_config.param_offload=True critic.model.fsdp_config.optimizer_offload=True \
    trainer.device=cuda trainer.n_gpus_per_node=1 \
    trainer.total_epochs=10 trainer.test_freq=10 trainer.save_freq=20 trainer.max_ckpt_to_keep=2 \
    trainer.project_name=gsm8k trainer.experiment_name=ppo_qwen2.5_1.5b "$@"
