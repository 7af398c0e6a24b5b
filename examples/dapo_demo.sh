#!/usr/bin/env bash
# DAPO on the demo's word problems, without a critic, on a machine without a GPU. After `make demo`, from whose warm
# start it goes on:
#
#   bash examples/dapo_demo.sh [key=value ...]
#
# What makes it DAPO (docs/algorithms.md): a wider clip range upwards, steps of prompts whose responses are neither all
# right nor all wrong, a penalty for responses that near the length limit, and a loss averaged over tokens.
set -euo pipefail
PYTHON=${PYTHON:-python3}
DEMO=${DEMO:-outputs/demo}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

MODEL=$DEMO/sft/global_step_900/huggingface
[ -d "$MODEL" ] || { echo "there is no $MODEL: run make demo first, or name the demo's folder in DEMO" >&2; exit 1; }
"$PYTHON" -m verl.trainer.main_ppo \
    data.train_files="$DEMO/data/train.parquet" data.val_files="$DEMO/data/test.parquet" \
    data.train_batch_size=32 data.max_prompt_length=32 data.max_response_length=32 \
    algorithm.adv_estimator=grpo \
    algorithm.filter_groups.enable=True algorithm.filter_groups.metric=acc \
    algorithm.filter_groups.max_num_gen_batches=20 \
    reward_model.overlong_buffer.enable=True reward_model.overlong_buffer.len=8 \
    reward_model.overlong_buffer.penalty_factor=1.0 \
    actor_rollout_ref.model.path="$MODEL" actor_rollout_ref.model.enable_gradient_checkpointing=False \
    actor_rollout_ref.rollout.name=hf actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.actor.ppo_mini_batch_size=16 actor_rollout_ref.actor.optim.lr=3e-4 \
    actor_rollout_ref.actor.clip_ratio_low=0.2 actor_rollout_ref.actor.clip_ratio_high=0.28 \
    actor_rollout_ref.actor.loss_agg_mode=token-mean \
    trainer.total_training_steps=30 trainer.test_freq=10 \
    trainer.project_name=demo trainer.experiment_name=dapo trainer.default_local_dir="$DEMO/dapo" "$@"
