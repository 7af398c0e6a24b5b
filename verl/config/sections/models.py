"""The whole configuration of each entry point, and the defaults that come from other keys."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar

from pydantic import model_validator

from verl.config.loading.schema import ABSENT, get, keys_of, plain, put
from verl.config.sections.actor import ActorConfig, ActorRolloutRefConfig, PolicyLossConfig, RefConfig
from verl.config.sections.algorithm import AlgorithmConfig, FilterGroupsConfig, KLControlConfig, RolloutCorrectionConfig
from verl.config.sections.base import Section
from verl.config.sections.critic import CriticConfig, CriticModelConfig
from verl.config.sections.data import DataConfig, SFTDataConfig
from verl.config.sections.effects import NO_RAY, NoEffect, always
from verl.config.sections.generation import (
    EvalDataConfig,
    EvalTrainerConfig,
    EvaluationConfig,
    GenerationDataConfig,
    GenerationTrainerConfig,
)
from verl.config.sections.parts import (
    CheckpointConfig,
    FSDPConfig,
    ModelConfig,
    OptimConfig,
    PolicyModelConfig,
    SFTOptimConfig,
)
from verl.config.sections.reward import (
    REWARD_MODEL_ALONE,
    CustomRewardFunctionConfig,
    JudgeConfig,
    OverlongBufferConfig,
    RewardConfig,
    RewardModelConfig,
)
from verl.config.sections.rollout import EngineConfig, RolloutConfig, ValidationSamplingConfig
from verl.config.sections.trainer import NO_CRITIC, RayKwargsConfig, SFTTrainerConfig, TrainerConfig

__all__ = [
    "ActorConfig",
    "ActorRolloutRefConfig",
    "AlgorithmConfig",
    "CheckpointConfig",
    "Config",
    "CriticConfig",
    "CriticModelConfig",
    "CustomRewardFunctionConfig",
    "DataConfig",
    "EngineConfig",
    "EvalConfig",
    "FSDPConfig",
    "FilterGroupsConfig",
    "GenerationConfig",
    "JudgeConfig",
    "KLControlConfig",
    "ModelConfig",
    "OptimConfig",
    "OverlongBufferConfig",
    "PolicyLossConfig",
    "PolicyModelConfig",
    "RayKwargsConfig",
    "RefConfig",
    "RewardConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "RolloutCorrectionConfig",
    "SFTConfig",
    "SFTDataConfig",
    "SFTOptimConfig",
    "SFTTrainerConfig",
    "TrainerConfig",
    "ValidationSamplingConfig",
]

ALWAYS_IN_USE = NoEffect("the model is in use all the time", always, only=("param_offload",))
NOT_TRAINED = NoEffect("nothing is trained", always, only=("enable_gradient_checkpointing", "use_remove_padding"))

# Defaults that are other keys' values. Every source comes before its use.
RUN_DEFAULTS = {
    "data.seed": "${trainer.seed}",
    "trainer.default_local_dir": "checkpoints/${trainer.project_name}/${trainer.experiment_name}",
}
PPO_DEFAULTS = {
    "actor_rollout_ref.model.tokenizer_path": "${actor_rollout_ref.model.path}",
    "actor_rollout_ref.actor.clip_ratio_low": "${actor_rollout_ref.actor.clip_ratio}",
    "actor_rollout_ref.actor.clip_ratio_high": "${actor_rollout_ref.actor.clip_ratio}",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu": (
        "${actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu}"
    ),
    "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz": "${actor_rollout_ref.actor.use_dynamic_bsz}",
    "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu": "${actor_rollout_ref.actor.ppo_max_token_len_per_gpu}",
    "actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu": (
        "${actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu}"
    ),
    "actor_rollout_ref.ref.log_prob_use_dynamic_bsz": "${actor_rollout_ref.rollout.log_prob_use_dynamic_bsz}",
    "actor_rollout_ref.ref.log_prob_max_token_len_per_gpu": (
        "${actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu}"
    ),
    "actor_rollout_ref.ref.fsdp_config.dtype": "${actor_rollout_ref.actor.fsdp_config.dtype}",
    "critic.model.path": "${actor_rollout_ref.model.path}",
    "critic.model.trust_remote_code": "${actor_rollout_ref.model.trust_remote_code}",
    "critic.model.attn_implementation": "${actor_rollout_ref.model.attn_implementation}",
    "critic.model.fsdp_config.dtype": "${actor_rollout_ref.actor.fsdp_config.dtype}",
    "critic.ppo_mini_batch_size": "${actor_rollout_ref.actor.ppo_mini_batch_size}",
    "critic.ppo_micro_batch_size_per_gpu": "${actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu}",
    "critic.forward_micro_batch_size_per_gpu": "${critic.ppo_micro_batch_size_per_gpu}",
    "critic.use_dynamic_bsz": "${actor_rollout_ref.actor.use_dynamic_bsz}",
    "critic.forward_max_token_len_per_gpu": "${critic.ppo_max_token_len_per_gpu}",
    "critic.ppo_epochs": "${actor_rollout_ref.actor.ppo_epochs}",
    "critic.shuffle": "${actor_rollout_ref.actor.shuffle}",
    "critic.loss_agg_mode": "${actor_rollout_ref.actor.loss_agg_mode}",
    "reward_model.model.trust_remote_code": "${actor_rollout_ref.model.trust_remote_code}",
    "reward_model.model.attn_implementation": "${actor_rollout_ref.model.attn_implementation}",
    "reward_model.model.fsdp_config.dtype": "${actor_rollout_ref.actor.fsdp_config.dtype}",
    "reward_model.micro_batch_size_per_gpu": "${actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu}",
    "reward_model.use_dynamic_bsz": "${actor_rollout_ref.rollout.log_prob_use_dynamic_bsz}",
    "reward_model.forward_max_token_len_per_gpu": "${actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu}",
}


def sources_of(reference: str) -> list[str]:
    """The keys that a default in terms of other keys names."""
    return re.findall(r"\$\{(.*?)\}", reference)


class Root(Section):
    """derived: keys whose default comes from other keys."""

    derived: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def fill_derived(cls, tree: Any) -> Any:
        tree = plain(tree)
        if isinstance(tree, dict):
            for key, source in cls.derived.items():
                if get(tree, key) in (ABSENT, None) and (value := cls._derive(source, tree)) is not ABSENT:
                    put(tree, key, value)
        return tree

    @classmethod
    def _derive(cls, source: str, tree: dict[str, Any]) -> Any:
        """A source that is one reference is that key's value; one with text around its references is text."""
        values = {name: cls._value_or_default(name, tree) for name in sources_of(source)}
        for name, value in values.items():
            if source == f"${{{name}}}":
                return value
            source = source.replace(f"${{{name}}}", str(value))
        return source

    @classmethod
    def _value_or_default(cls, key: str, tree: dict[str, Any]) -> Any:
        value = get(tree, key)
        return keys_of(cls)[key].default if value is ABSENT else value


class Config(Root):
    """What ``verl.trainer.main_ppo`` takes."""

    derived: ClassVar[dict[str, str]] = RUN_DEFAULTS | PPO_DEFAULTS

    data: DataConfig = DataConfig()
    actor_rollout_ref: ActorRolloutRefConfig
    critic: Annotated[CriticConfig, NO_CRITIC]
    algorithm: AlgorithmConfig = AlgorithmConfig()
    reward: Annotated[RewardConfig, REWARD_MODEL_ALONE] = RewardConfig()
    custom_reward_function: Annotated[CustomRewardFunctionConfig, REWARD_MODEL_ALONE] = CustomRewardFunctionConfig()
    reward_model: RewardModelConfig = RewardModelConfig()
    trainer: TrainerConfig = TrainerConfig()
    ray_kwargs: Annotated[RayKwargsConfig, NO_RAY] = RayKwargsConfig()

    @property
    def uses_scorers(self) -> bool:
        """Whether scorers of data sources, or the user's function, have a part in the score."""
        return not self.reward_model.enable or self.reward_model.combine == "add"


class SFTConfig(Root):
    """What ``verl.trainer.main_sft`` takes."""

    derived: ClassVar[dict[str, str]] = RUN_DEFAULTS | {"model.tokenizer_path": "${model.path}"}

    data: SFTDataConfig = SFTDataConfig()
    model: PolicyModelConfig
    optim: SFTOptimConfig = SFTOptimConfig()
    fsdp_config: Annotated[FSDPConfig, ALWAYS_IN_USE] = FSDPConfig()
    trainer: SFTTrainerConfig = SFTTrainerConfig()


class GenerationConfig(Root):
    """What ``verl.trainer.main_generation`` takes."""

    derived: ClassVar[dict[str, str]] = {"model.tokenizer_path": "${model.path}"}

    data: GenerationDataConfig
    model: Annotated[PolicyModelConfig, NOT_TRAINED]
    rollout: EngineConfig
    trainer: GenerationTrainerConfig = GenerationTrainerConfig()
    ray_kwargs: Annotated[RayKwargsConfig, NO_RAY] = RayKwargsConfig()


class EvalConfig(Root):
    """What ``verl.trainer.main_eval`` takes."""

    data: EvalDataConfig
    reward: RewardConfig = RewardConfig()
    custom_reward_function: CustomRewardFunctionConfig = CustomRewardFunctionConfig()
    eval: EvaluationConfig = EvaluationConfig()
    trainer: EvalTrainerConfig = EvalTrainerConfig()
