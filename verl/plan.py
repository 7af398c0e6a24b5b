"""The plan of a run: all of its arithmetic, worked out before anything starts and used by trainer and workers alike.

Pure: no torch, no file, no device is touched here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from verl.algorithms.advantages import resolve
from verl.errors import UserError

if TYPE_CHECKING:
    from verl.config.sections.models import ActorConfig, Config, CriticConfig


MOST_AT_A_TIME = 1024  # responses of a replica: SGLang's CUDA graphs go up to it


@dataclass(frozen=True)
class Split:
    """How one rank's rows are cut into micro-batches.

    rows: sequences of one rank.
    micro_batch_size: sequences of a micro-batch, at most ``rows``; None when cut by tokens.
    max_tokens: tokens of a micro-batch (use_dynamic_bsz, or no size asked for); None when cut by sequences.
    asked: the micro-batch size that the config names, before the cap; None when it names none.
    """

    rows: int
    micro_batch_size: int | None
    max_tokens: int | None
    asked: int | None

    @classmethod
    def of(cls, rows: int, asked: int | None, dynamic: bool, max_tokens: int) -> Split:
        if dynamic or asked is None:
            return cls(rows, None, max_tokens, asked)
        return cls(rows, min(asked, rows), None, asked)

    @property
    def capped(self) -> bool:
        return self.micro_batch_size is not None and self.asked is not None and self.micro_batch_size < self.asked

    @property
    def micro_batches(self) -> int | None:
        """None when cut by tokens: it depends on the responses."""
        return None if self.micro_batch_size is None else ceil_div(self.rows, self.micro_batch_size)


@dataclass(frozen=True)
class UpdatePlan:
    """A step's updates of one model.

    mini_batch_size: prompts of an optimizer step, over all ranks.
    mini_batches: of one pass over the step's trajectories.
    epochs: passes.
    split: one rank's share of a mini-batch.
    """

    mini_batch_size: int
    mini_batches: int
    epochs: int
    split: Split

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
class RunPlan:
    """Sizes, counts and roles of a run. ``None`` marks what the (missing) data would tell.

    executor: where ranks live, as trainer.executor says.
    prompts, samples: prompts a step and responses to each.
    forwards: how a rank cuts each forward over the step's trajectories: "old_log_probs", "ref_log_probs", "values",
        "reward_scores".
    roles: models built for training or scoring ("actor", "critic", "reference", "reward") -> why.
    models: of these, the sizes that are known.
    replicas, tensor_parallel: copies of the rollout engine, and devices of each.
    context_length: prompt and response tokens that the rollout engine must hold.
    asked_num_seqs: rollout.max_num_seqs.
    """

    device: Literal["cpu", "cuda"]
    executor: Literal["auto", "local", "ray"]
    nnodes: int
    devices_per_node: int
    prompts: int
    samples: int
    actor: UpdatePlan
    critic: UpdatePlan | None
    forwards: dict[str, Split]
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
    asked_num_seqs: int | None = None

    @property
    def world_size(self) -> int:
        return self.nnodes * self.devices_per_node

    @property
    def uses_ray(self) -> bool:
        """Whether ranks are processes of their own."""
        return self.executor == "ray" or (self.executor == "auto" and self.world_size > 1)

    @property
    def replicas(self) -> int:
        return self.world_size // self.tensor_parallel

    @property
    def max_num_seqs(self) -> int:
        """Responses that a replica generates at a time: unless asked otherwise, all of a step's or a validation's, up
        to ``MOST_AT_A_TIME``. Others would wait and be admitted a few at a time, by passes without CUDA graphs."""
        if self.asked_num_seqs is not None:
            return self.asked_num_seqs
        most = self.trajectories
        if self.validates_ever:
            most = MOST_AT_A_TIME if self.val_rows is None else max(most, self.val_rows * self.val_samples)
        return min(ceil_div(most, self.replicas), MOST_AT_A_TIME)

    @property
    def trajectories(self) -> int:
        """Responses a step, over all ranks."""
        return self.prompts * self.samples

    @property
    def steps_per_epoch(self) -> int | None:
        return None if self.train_rows is None else self.train_rows // self.prompts

    @property
    def rows_left_out(self) -> int | None:
        """Rows that an epoch does not reach, because a step's batch is always full."""
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
        tensor_parallel=1 if rollout.name == "hf" or rollout.mode == "server" else rollout.tensor_model_parallel_size,
        max_prompt_length=data.max_prompt_length,
        max_response_length=data.max_response_length,
        context_length=rollout.max_model_len or data.max_prompt_length + data.max_response_length,
        asked_num_seqs=rollout.max_num_seqs,
    )


def roles_of(config: Config) -> dict[str, str]:
    """The models a run builds, each with the reason."""
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
    """Whether the advantages are made of values; False as well when there is no such estimator."""
    try:
        return resolve(config.algorithm.adv_estimator).needs_critic
    except UserError:
        return False


def ceil_div(a: int, b: int) -> int:
    return -(-a // b) if b else 0


def is_due(step: int, every: int, last: int | None) -> bool:
    """Each ``every`` steps and at the last one; never when ``every`` is not positive."""
    return every > 0 and step > 0 and (step % every == 0 or step == last)


def _update(config: Config, settings: ActorConfig | CriticConfig) -> UpdatePlan:
    world = config.trainer.nnodes * config.trainer.n_gpus_per_node
    return UpdatePlan(
        mini_batch_size=settings.ppo_mini_batch_size,
        mini_batches=config.data.train_batch_size // settings.ppo_mini_batch_size,
        epochs=settings.ppo_epochs,
        split=Split.of(
            settings.ppo_mini_batch_size * config.actor_rollout_ref.rollout.n // world,
            settings.ppo_micro_batch_size_per_gpu,
            settings.use_dynamic_bsz,
            settings.ppo_max_token_len_per_gpu,
        ),
    )


def _forwards(config: Config, share: int, roles: dict[str, str]) -> dict[str, Split]:
    rollout, ref, critic = config.actor_rollout_ref.rollout, config.actor_rollout_ref.ref, config.critic
    reward = config.reward_model
    log_probs = (rollout.log_prob_use_dynamic_bsz, rollout.log_prob_max_token_len_per_gpu)
    ref_log_probs = (ref.log_prob_use_dynamic_bsz, ref.log_prob_max_token_len_per_gpu)
    values = (critic.use_dynamic_bsz, critic.forward_max_token_len_per_gpu)
    forwards = {"old_log_probs": Split.of(share, rollout.log_prob_micro_batch_size_per_gpu, *log_probs)}
    if "reference" in roles:
        forwards["ref_log_probs"] = Split.of(share, ref.log_prob_micro_batch_size_per_gpu, *ref_log_probs)
    if "critic" in roles:
        forwards["values"] = Split.of(share, critic.forward_micro_batch_size_per_gpu, *values)
    if "reward" in roles:
        by_tokens = (reward.use_dynamic_bsz, reward.forward_max_token_len_per_gpu)
        forwards["reward_scores"] = Split.of(share, reward.micro_batch_size_per_gpu, *by_tokens)
    return forwards
