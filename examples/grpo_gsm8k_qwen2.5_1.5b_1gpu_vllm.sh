#!/usr/bin/env bash
# GRPO on GSM8K with Qwen2.5-1.5B-Instruct, on one GPU of 80 GB, vLLM generating.
# Not run by us: vLLM has only been run on CPUs so far (docs/vllm.md). Updates of this shape were measured on one H100
# (docs/performance.md).
#
#   bash examples/grpo_gsm8k_qwen2.5_1.5b_1gpu_vllm.sh [key=value ...]
#
# Install: pip install -e ".[vllm,data]". Data: python3 examples/data_preprocess/gsm8k.py.
# With trainer.dry_run=True it prints its plan, on any machine.
# The share of GPU memory is vLLM's of all there is (SGLang's is of what is free). While training runs vLLM has none.
set -euo pipefail
PYTHON=${PYTHON:-python3}
DATA=${DATA:-$HOME/data/gsm8k}
MODEL=${MODEL:-Qwen/Qwen2.5-1.5B-Instruct}

"$PYTHON" -m verl.trainer.main_ppo \
    data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" \
    data.train_batch_size=128 data.max_prompt_length=512 data.max_response_length=1024 \
    algorithm.adv_estimator=grpo \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.rollout.gpu_memory_utilization=0.5 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.ppo_mini_batch_size=32 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=32768 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    actor_rollout_ref.actor.use_kl_loss=True actor_rollout_ref.actor.kl_loss_coef=0.001 \
    actor_rollout_ref.actor.fsdp_config.param_offload=True actor_rollout_ref.actor.fsdp_config.optimizer_offload=True \
    actor_rollout_ref.ref.fsdp_config.param_offload=True \
    trainer.device=cuda trainer.n_gpus_per_node=1 \
    trainer.total_epochs=2 trainer.test_freq=10 trainer.save_freq=20 trainer.max_ckpt_to_keep=2 \
    trainer.project_name=gsm8k trainer.experiment_name=grpo_qwen2.5_1.5b_vllm "$@"
