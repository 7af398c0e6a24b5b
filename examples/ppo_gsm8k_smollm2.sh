#!/usr/bin/env bash
# PPO with a critic on real GSM8K with SmolLM2-135M-Instruct, on a machine without a GPU.
#
#   bash examples/ppo_gsm8k_smollm2.sh [key=value ...]
#
# Data: python3 examples/data_preprocess/gsm8k.py (from the hub, or with --local_dataset_path from JSONL files).
# Model: from the folder $MODEL, made by examples/models/smollm2.py if it is not there.
# The model rarely writes "#### answer", so the last number of its answer counts (reward.gsm8k.method=flexible).
set -euo pipefail
PYTHON=${PYTHON:-python3}
DATA=${DATA:-$HOME/data/gsm8k}
MODEL=${MODEL:-$HOME/models/SmolLM2-135M-Instruct}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

[ -f "$MODEL/config.json" ] || "$PYTHON" "$(dirname "$0")/models/smollm2.py" --output "$MODEL"
"$PYTHON" -m verl.trainer.main_ppo \
    data.train_files="$DATA/train.parquet" data.val_files="$DATA/test.parquet" \
    data.train_batch_size=4 data.max_prompt_length=320 data.max_response_length=128 \
    data.filter_overlong_prompts=True data.val_max_samples=8 \
    actor_rollout_ref.rollout.name=hf actor_rollout_ref.rollout.n=2 \
    actor_rollout_ref.model.path="$MODEL" \
    actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.actor.ppo_max_token_len_per_gpu=2048 \
    actor_rollout_ref.actor.optim.lr=1e-6 \
    critic.optim.lr=1e-5 critic.ppo_max_token_len_per_gpu=2048 \
    algorithm.kl_ctrl.kl_coef=0.001 \
    reward.gsm8k.method=flexible \
    trainer.total_training_steps=3 trainer.val_before_train=False trainer.test_freq=3 \
    trainer.project_name=gsm8k trainer.experiment_name=smollm2 "$@"
