"""Names and values that other versions of the configuration use, and their names here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Old name (of a key or of a whole section) -> name here.
RENAMED = {
    "algorithm.rollout_correction.rollout_is": "algorithm.rollout_correction.level",
    "algorithm.rollout_correction.rollout_is_threshold": "algorithm.rollout_correction.threshold",
    "data.tokenizer": "actor_rollout_ref.model.tokenizer_path",
    "actor_rollout_ref.actor.optim.warmup_style": "actor_rollout_ref.actor.optim.lr_scheduler_type",
    "actor_rollout_ref.actor.checkpoint.contents": "actor_rollout_ref.actor.checkpoint.save_contents",
    "actor_rollout_ref.rollout.prompt_length": "data.max_prompt_length",
    "actor_rollout_ref.rollout.response_length": "data.max_response_length",
    "actor_rollout_ref.actor.use_torch_compile": "actor_rollout_ref.actor.fsdp_config.use_torch_compile",
    "actor_rollout_ref.ref.use_torch_compile": "actor_rollout_ref.ref.fsdp_config.use_torch_compile",
    "critic.optim.warmup_style": "critic.optim.lr_scheduler_type",
    "critic.checkpoint.contents": "critic.checkpoint.save_contents",
    "critic.fsdp": "critic.model.fsdp_config",
    "critic.fsdp_config": "critic.model.fsdp_config",
    "optim.warmup_style": "optim.lr_scheduler_type",
    "ray_init": "ray_kwargs.ray_init",
    "reward.custom_reward_function": "custom_reward_function",
    "reward.reward_model": "reward_model",
    "reward_model.reward_kwargs.overlong_buffer_cfg": "reward_model.overlong_buffer",
    "reward.reward_manager.name": "reward_model.reward_manager",
    "trainer.max_actor_ckpt_to_keep": "trainer.max_ckpt_to_keep",
    "trainer.max_critic_ckpt_to_keep": "trainer.max_ckpt_to_keep",
}

# Old batch size over all ranks -> batch size of one rank. The value is divided by the number of ranks.
PER_RANK = {
    "actor_rollout_ref.actor.ppo_micro_batch_size": "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size": (
        "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu"
    ),
    "actor_rollout_ref.ref.log_prob_micro_batch_size": "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu",
    "critic.ppo_micro_batch_size": "critic.ppo_micro_batch_size_per_gpu",
    "critic.forward_micro_batch_size": "critic.forward_micro_batch_size_per_gpu",
}

# Keys of old commands that decide nothing any more.
WITHOUT_EFFECT = {
    "data.gen_batch_size": "a step draws prompts until it has data.train_batch_size of them",
    "data.val_batch_size": "validation takes all prompts at once",
    "data.return_raw_chat": "the chat messages always travel along",
    "reward_model.overlong_buffer.log": "the penalties are always among the metrics",
    "reward_model.reward_kwargs.overlong_buffer_cfg.log": "the penalties are always among the metrics",
    "reward_model.reward_kwargs.max_resp_len": "data.max_response_length says it",
    "actor_rollout_ref.hybrid_engine": "rollout and training always take turns on the same devices",
    "actor_rollout_ref.actor.strategy": "models are sharded by FSDP2",
    "critic.strategy": "models are sharded by FSDP2",
    "actor_rollout_ref.rollout.calculate_log_probs": "every engine gives the log-probs of its tokens",
}

# Old values: (key, old value) -> value here.
REVALUED = {
    ("actor_rollout_ref.rollout.name", "sglang_async"): "sglang",
    ("actor_rollout_ref.rollout.mode", "sync"): "colocated",
    ("actor_rollout_ref.rollout.mode", "async"): "colocated",
    ("algorithm.rollout_correction.mode", "truncate"): "clamp",
    ("algorithm.filter_groups.metric", "seq_reward"): "score",
    ("reward_model.reward_manager", "prime"): "naive",
    ("reward_model.reward_manager", "dapo"): "naive",
}


@dataclass(frozen=True)
class Canonical:
    """A setting under its name here. key: None if it has no effect. per_rank: whether the value must be divided by the
    number of ranks. notice: a message to the user."""

    key: str | None
    value: Any
    per_rank: bool = False
    notice: str | None = None


def canonical(key: str, value: Any) -> Canonical:
    if key in WITHOUT_EFFECT:
        return Canonical(None, value, notice=f"{key} has no effect: {WITHOUT_EFFECT[key]}.")
    if key in PER_RANK:
        return Canonical(PER_RANK[key], value, per_rank=True)
    if new_key := _renamed(key):
        return Canonical(new_key, value, notice=f"{key} is an old name of {new_key}.")
    if isinstance(value, str) and (new_value := REVALUED.get((key, value))):
        return Canonical(key, new_value, notice=f"{key}={value} is an old name of {key}={new_value}.")
    return Canonical(key, value)


def _renamed(key: str) -> str | None:
    for old, new in RENAMED.items():
        if key == old or key.startswith(old + "."):
            return new + key[len(old) :]
    return None
