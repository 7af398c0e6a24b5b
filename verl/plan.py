"""The plan of a run: all of its arithmetic. Checks, trainer and workers use the same plan.

The module uses no torch, file or device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from verl.algorithms.advantages import resolve
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.config.sections.base import DType
    from verl.config.sections.models import (
        ActorConfig,
        Config,
        CriticConfig,
        EngineConfig,
        GenerationConfig,
        PolicyModelConfig,
    )


@dataclass(frozen=True)
class MicroBatching:
    """How one rank's rows are cut into micro-batches. The plan of a run makes it, the engine cuts by it.

    micro_batch_size: sequences of a micro-batch at most; None is no limit.
    max_tokens: tokens of a micro-batch at most, prompts and responses, and padding where there is any (sequences times
        the longest one); None is no limit. A longer sequence is a micro-batch of its own. Padded sequences are cut
        further where their padding costs more than another forward.
    rows: sequences of one rank; 0 where the caller does not plan them.
    configured: the micro-batch size of the config, before it is capped; None if the config has none.
    """

    micro_batch_size: int | None = None
    max_tokens: int | None = None
    rows: int = 0
    configured: int | None = None

    @classmethod
    def of(cls, rows: int, configured: int | None, dynamic: bool, max_tokens: int) -> MicroBatching:
        """Cut by tokens if ``dynamic`` (use_dynamic_bsz) or if no size is configured; by sequences otherwise, and never
        by more than ``rows``."""
        if dynamic or configured is None:
            return cls(None, max_tokens, rows, configured)
        return cls(min(configured, rows), None, rows, configured)

    @property
    def capped(self) -> bool:
        size, configured = self.micro_batch_size, self.configured
        return size is not None and configured is not None and size < configured

    @property
    def micro_batches(self) -> int | None:
        """Micro-batches of one rank. None when cut by tokens: the number depends on the responses."""
        return None if self.micro_batch_size is None else ceil_div(self.rows, self.micro_batch_size)


@dataclass(frozen=True)
class UpdatePlan:
    """A step's updates of one model.

    mini_batch_size: prompts of an optimizer step, over all ranks.
    mini_batches: of one pass over the step's trajectories.
    epochs: passes.
    micro_batching: one rank's share of a mini-batch.
    """

    mini_batch_size: int
    mini_batches: int
    epochs: int
    micro_batching: MicroBatching

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of one PPO step."""
        return self.mini_batches * self.epochs


@dataclass(frozen=True)
class ModelSize:
    """dtype: of its files, as torch names it; None where they do not say."""

    parameters: int
    dtype: str | None


@dataclass(frozen=True)
class Placement:
    """The devices of a run. executor: value of trainer.executor."""

    device: Literal["cpu", "cuda"]
    executor: Literal["auto", "local", "ray"]
    nnodes: int
    devices_per_node: int

    @property
    def world_size(self) -> int:
        return self.nnodes * self.devices_per_node

    @property
    def uses_ray(self) -> bool:
        """Whether ranks are separate processes."""
        return self.executor == "ray" or (self.executor == "auto" and self.world_size > 1)


@dataclass(frozen=True)
class EnginePlan(Placement):
    """The rollout engine of a run: its model, its settings and its devices. Training and generation both have one.

    context_length: tokens of prompt and response that the engine must hold.
    compute_dtype: ``rollout.dtype=auto`` is the type of this computation.
    reshard_after_forward: of the model that the embedded engine shares with the trainer.
    free_cache: whether the engine sleeps between stages. restarts: of each replica that dies.
    bucket_megabytes: of a buffer for new weights. weights_dir: folder for the weights of servers; None: over HTTP.
    """

    model: PolicyModelConfig
    rollout: EngineConfig
    context_length: int
    seed: int
    compute_dtype: DType = "auto"
    reshard_after_forward: bool = True
    free_cache: bool = False
    restarts: int = 0
    bucket_megabytes: int = 256
    weights_dir: str | None = None

    @property
    def name(self) -> str:
        return self.rollout.name

    @property
    def tensor_parallel(self) -> int:
        """Devices of one copy of the engine's model."""
        return tensor_parallel_of(self.rollout)

    @property
    def replicas(self) -> int:
        return self.world_size // self.tensor_parallel


@dataclass(frozen=True)
class RunPlan(Placement):
    """Sizes, counts and roles of a run. ``None``: unknown without the data.

    prompts, samples: prompts a step and responses to each.
    forwards: how a rank cuts each forward over the step's trajectories: "old_log_probs", "ref_log_probs", "values",
        "reward_scores".
    roles: models built for training or scoring ("actor", "critic", "reference", "reward") -> why.
    models: of these, the sizes that are known.
    replicas, tensor_parallel: copies of the rollout engine, and devices of each.
    context_length: prompt and response tokens that the rollout engine must hold.
    """

    prompts: int
    samples: int
    actor: UpdatePlan
    critic: UpdatePlan | None
    forwards: dict[str, MicroBatching]
    train_rows: int | None
    val_rows: int | None
    val_samples: int
    total_epochs: int
    asked_steps: int | None
    test_freq: int
    save_freq: int
    val_before_train: bool
    critic_warmup: int
    roles: dict[str, str]
    models: Mapping[str, ModelSize]
    engine: str
    tensor_parallel: int
    max_prompt_length: int
    max_response_length: int
    context_length: int

    @property
    def replicas(self) -> int:
        return self.world_size // self.tensor_parallel

    @property
    def trajectories(self) -> int:
        """Responses a step, over all ranks."""
        return self.prompts * self.samples

    @property
    def steps_per_epoch(self) -> int | None:
        return None if self.train_rows is None else self.train_rows // self.prompts

    @property
    def rows_left_out(self) -> int | None:
        """The number of rows that an epoch leaves out, because a step's batch is always full."""
        return None if self.train_rows is None else self.train_rows % self.prompts

    @property
    def total_steps(self) -> int | None:
        """trainer.total_training_steps, whatever number of epochs that takes; else total_epochs' worth."""
        if self.asked_steps is not None:
            return self.asked_steps if self.steps_per_epoch != 0 else 0
        return None if self.steps_per_epoch is None else self.steps_per_epoch * self.total_epochs

    @property
    def last_step(self) -> int:
        """``total_steps`` of a run whose data have been read. UserError when they do not fill a single step."""
        assert self.total_steps is not None
        if self.total_steps == 0:
            raise UserError(
                f"data.train_batch_size={self.prompts} is more than the {self.train_rows} training prompts "
                "(after filtering): no step could be filled. Set it to at most that."
            )
        return self.total_steps

    def trains_actor(self, step: int) -> bool:
        """Steps count from 1; before step ``critic_warmup`` only the critic trains."""
        return self.critic is None or step >= self.critic_warmup

    def validates(self, step: int) -> bool:
        """Step 0 is before training."""
        if step == 0:
            return self.val_before_train
        return is_due(step, self.test_freq, self.total_steps)

    @property
    def validates_ever(self) -> bool:
        return self.val_before_train or self.test_freq > 0

    def saves(self, step: int) -> bool:
        return is_due(step, self.save_freq, self.total_steps)

    def steps(self, due: Callable[[int], bool]) -> list[int]:
        """The steps for which ``due`` (``plan.validates``, ``plan.saves``) holds; step 0 alone at most while
        total_steps is unknown."""
        return [step for step in range((self.total_steps or 0) + 1) if due(step)]


def plan_run(
    config: Config,
    *,
    device: Literal["cpu", "cuda"],
    train_rows: int | None = None,
    val_rows: int | None = None,
    models: Mapping[str, ModelSize] = MappingProxyType({}),
) -> RunPlan:
    """``train_rows``, ``val_rows``: rows of the data sets, as far as known; ``models``: by role, likewise."""
    data, trainer = config.data, config.trainer
    model, rollout = config.actor_rollout_ref, config.actor_rollout_ref.rollout
    world = trainer.nnodes * trainer.n_gpus_per_node
    roles = roles_of(config)
    share = data.train_batch_size * rollout.n // world
    return RunPlan(
        device=device,
        executor=trainer.executor,
        nnodes=trainer.nnodes,
        devices_per_node=trainer.n_gpus_per_node,
        prompts=data.train_batch_size,
        samples=rollout.n,
        actor=_update(config, model.actor),
        critic=_update(config, config.critic) if "critic" in roles else None,
        forwards=_forwards(config, share, roles),
        train_rows=train_rows,
        val_rows=val_rows,
        val_samples=rollout.val_kwargs.n,
        total_epochs=trainer.total_epochs,
        asked_steps=trainer.total_training_steps,
        test_freq=trainer.test_freq,
        save_freq=trainer.save_freq,
        val_before_train=trainer.val_before_train,
        critic_warmup=trainer.critic_warmup,
        roles=roles,
        models=dict(models),
        engine=rollout.name,
        tensor_parallel=tensor_parallel_of(rollout),
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
        context_length=rollout.max_model_len or data.max_prompt_length + data.max_response_length,
    )


def tensor_parallel_of(rollout: EngineConfig) -> int:
    """Devices of one copy of the engine's model: 1 if the engine is embedded or on servers."""
    return 1 if rollout.name == "hf" or rollout.mode == "server" else rollout.tensor_model_parallel_size


def engine_of(config: Config, plan: RunPlan) -> EnginePlan:
    """The rollout engine of a training run."""
    policy = config.actor_rollout_ref
    rollout, fsdp = policy.rollout, policy.actor.fsdp_config
    return EnginePlan(
        device=plan.device,
        executor=plan.executor,
        nnodes=plan.nnodes,
        devices_per_node=plan.devices_per_node,
        model=policy.model,
        rollout=rollout,
        context_length=plan.context_length,
        seed=config.trainer.seed,
        compute_dtype=fsdp.dtype,
        reshard_after_forward=fsdp.reshard_after_forward,
        free_cache=rollout.free_cache_engine,
        restarts=config.trainer.rollout_restarts,
        bucket_megabytes=rollout.update_weights_bucket_megabytes,
        weights_dir=rollout.server_weights_dir if rollout.server_weight_update == "disk" else None,
    )


def engine_of_generation(config: GenerationConfig, device: Literal["cpu", "cuda"]) -> EnginePlan:
    """The engine of a generation run. It reads the model's weights itself and never gets new ones."""
    data, trainer = config.data, config.trainer
    return EnginePlan(
        device=device,
        executor=trainer.executor,
        nnodes=trainer.nnodes,
        devices_per_node=trainer.n_gpus_per_node,
        model=config.model,
        rollout=config.rollout,
        context_length=config.rollout.max_model_len or data.max_prompt_length + data.max_response_length,
        seed=trainer.seed,
    )


def roles_of(config: Config) -> dict[str, str]:
    """The models that a run builds -> the reason."""
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    roles = {"actor": "the policy that is trained"}
    if config.critic.enable is not False and needs_critic(config):
        roles["critic"] = f"algorithm.adv_estimator={algorithm.adv_estimator} needs values"
    elif config.critic.enable:
        roles["critic"] = "critic.enable=True"
    reasons = []
    if algorithm.use_kl_in_reward:
        reasons.append("KL penalty in the reward (algorithm.use_kl_in_reward)")
    if actor.use_kl_loss:
        reasons.append("KL term in the loss (actor_rollout_ref.actor.use_kl_loss)")
    if reasons:
        roles["reference"] = " and ".join(reasons)
    if config.reward_model.enable:
        roles["reward"] = "it scores responses (reward_model.enable)"
    return roles


def needs_critic(config: Config) -> bool:
    """Whether the advantages need values. False also if there is no such estimator."""
    try:
        return resolve(config.algorithm.adv_estimator).needs_critic
    except UserError:
        return False


def ceil_div(a: int, b: int) -> int:
    return -(-a // b) if b else 0


def is_due(step: int, every: int, last: int | None) -> bool:
    """Whether ``step`` is a multiple of ``every`` or the last step. Never if ``every`` is not positive."""
    return every > 0 and step > 0 and (step % every == 0 or step == last)


def _update(config: Config, settings: ActorConfig | CriticConfig) -> UpdatePlan:
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    return UpdatePlan(
        mini_batch_size=settings.ppo_mini_batch_size,
        mini_batches=config.data.train_batch_size // settings.ppo_mini_batch_size,
        epochs=settings.ppo_epochs,
        micro_batching=MicroBatching.of(
            settings.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // world,
            settings.ppo_micro_batch_size_per_gpu,
            settings.use_dynamic_bsz,
            settings.ppo_max_token_len_per_gpu,
        ),
    )


def _forwards(config: Config, share: int, roles: dict[str, str]) -> dict[str, MicroBatching]:
    rollout, ref, critic = config.actor_rollout_ref.rollout, config.actor_rollout_ref.ref, config.critic
    reward = config.reward_model
    log_probs = (rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu)
    ref_log_probs = (ref.log_prob_use_dynamic_bsz, ref.log_prob_max_token_len_per_gpu)
    values = (critic.use_dynamic_bsz, critic.forward_max_token_len_per_gpu)
    forwards = {"old_log_probs": MicroBatching.of(share, rollout.log_prob_micro_batch_size_per_gpu, *log_probs)}
    if "reference" in roles:
        forwards["ref_log_probs"] = MicroBatching.of(share, ref.log_prob_micro_batch_size_per_gpu, *ref_log_probs)
    if "critic" in roles:
        forwards["values"] = MicroBatching.of(share, critic.forward_micro_batch_size_per_gpu, *values)
    if "reward" in roles:
        by_tokens = (reward.use_dynamic_bsz, reward.forward_max_token_len_per_gpu)
        forwards["reward_scores"] = MicroBatching.of(share, reward.micro_batch_size_per_gpu, *by_tokens)
    return forwards
