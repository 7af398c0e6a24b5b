"""Keys that the user set and that do nothing in this run: a table of which, when and why.

A key that is neither here nor used somewhere is a bug: ``tests/checks/test_inert.py`` looks for such keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from verl.algorithms.advantages import ESTIMATORS
from verl.algorithms.loss_modes import KEY as LOSS_MODE
from verl.algorithms.loss_modes import LOSS_MODES
from verl.checks.settings import ACTOR, REF, ROLLOUT, SPLIT_KEYS, splits
from verl.config.loading.problems import shown
from verl.plan import RunPlan
from verl.reward.scorers import SCORERS

if TYPE_CHECKING:
    from verl.config.sections.models import Config, OptimConfig


@dataclass(frozen=True)
class Run:
    config: Config
    plan: RunPlan
    set_keys: frozenset[str]

    def by_tokens(self, *names: str) -> bool:
        """All of these micro-batches (names of SPLIT_KEYS) are cut by tokens; those that the run has."""
        return all(split.max_tokens is not None for name, split in splits(self.plan).items() if name in names)

    def by_sequences(self, *names: str) -> bool:
        return all(split.max_tokens is None for name, split in splits(self.plan).items() if name in names)


@dataclass(frozen=True)
class Rule:
    """keys: patterns of dotted keys; spared: exceptions. The first rule that holds for a key names it."""

    keys: tuple[str, ...]
    when: Callable[[Run], bool]
    why: str
    spared: tuple[str, ...] = ()

    def covers(self, key: str) -> bool:
        return any(fnmatchcase(key, p) for p in self.keys) and not any(fnmatchcase(key, p) for p in self.spared)


def find_inert(config: Config, plan: RunPlan, set_keys: Iterable[str]) -> list[str]:
    """One sentence a reason, naming the keys that it makes inert, with their values. A key set to null says nothing."""
    run = Run(config, plan, frozenset(set_keys))
    by_reason: dict[str, list[str]] = {}
    for key in sorted(run.set_keys):
        value = value_at(config, key)
        rule = next((rule for rule in RULES if rule.covers(key) and rule.when(run)), None)
        if rule is not None and value is not None:
            by_reason.setdefault(rule.why, []).append(f"{key}={shown(value)}")
    return [f"{', '.join(keys)} has no effect: {why}." for why, keys in by_reason.items()]


def value_at(config: Any, key: str) -> Any:
    """The value of a dotted key; keys below a free-form dict too."""
    value = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else getattr(value, name)
    return value


def _role(run: Run, role: str) -> bool:
    return role in run.plan.roles


def _one_rank(run: Run) -> bool:
    return run.plan.world_size == 1


CORRECTION = "algorithm.rollout_correction"
NOT_VALIDATED = "nothing is validated (trainer.test_freq, trainer.val_before_train)"
BY_TOKENS = "micro-batches are cut by tokens there (use_dynamic_bsz)"
BY_SEQUENCES = "micro-batches are cut by sequences there (a micro-batch size is set and use_dynamic_bsz is off)"

# Whose size and token keys -> the micro-batches that they reach, their own and those that take them for a default.
REACH = {
    "actor": tuple(SPLIT_KEYS),
    "old_log_probs": ("old_log_probs", "ref_log_probs", "reward_scores"),
    "ref_log_probs": ("ref_log_probs",),
    "critic": ("critic", "values"),
    "values": ("values",),
    "reward_scores": ("reward_scores",),
}


def _micro_batch_rules(name: str) -> tuple[Rule, Rule]:
    size_key, tokens_key = SPLIT_KEYS[name]
    reach = REACH[name]
    return (
        Rule((size_key,), lambda run: run.by_tokens(*reach), BY_TOKENS),
        Rule((tokens_key,), lambda run: run.by_sequences(*reach), BY_SEQUENCES),
    )


def _optimizer_rules(owner: str) -> tuple[Rule, Rule]:
    def optim(run: Run) -> OptimConfig:
        return value_at(run.config, f"{owner}.optim")

    return (
        Rule(
            (f"{owner}.optim.lr_warmup_steps_ratio",),
            lambda run: optim(run).lr_warmup_steps >= 0,
            "lr_warmup_steps stands for it",
        ),
        Rule(
            (f"{owner}.optim.min_lr_ratio",),
            lambda run: optim(run).lr_scheduler_type == "constant",
            "the schedule is constant",
        ),
    )


def _checkpoint_rule(owner: str) -> Rule:
    key = f"{owner}.checkpoint.save_contents"
    return Rule(
        (key,),
        lambda run: not {"model", "optimizer", "extra"} <= set(value_at(run.config, key)),
        "a checkpoint always holds model, optimizer and extra; hf_model may come on top",
    )


def _estimator_rule(name: str) -> Rule:
    """Of a key of the algorithm section that only some estimators read."""
    readers = [estimator.name for estimator in ESTIMATORS.values() if name in (estimator.reads or ())]

    def unread(run: Run) -> bool:
        chosen = run.config.algorithm.adv_estimator
        return chosen in ESTIMATORS and chosen not in readers

    return Rule((f"algorithm.{name}",), unread, f"it belongs to algorithm.adv_estimator={' or '.join(readers)}")


def _loss_rule(name: str) -> Rule:
    """Of a key of the actor's section that only some policy losses read."""
    readers = [mode.name for mode in LOSS_MODES.values() if name in (mode.reads or ())]

    def unread(run: Run) -> bool:
        chosen = run.config.actor_rollout_ref.actor.policy_loss.loss_mode
        return chosen in LOSS_MODES and chosen not in readers

    return Rule((f"{ACTOR}.{name}",), unread, f"it belongs to {LOSS_MODE}={' or '.join(readers)}")


RULES = (
    # roles that are not built
    Rule(
        ("critic.*", "trainer.critic_warmup"),
        lambda run: not _role(run, "critic"),
        "no critic is built, the advantages need none (algorithm.adv_estimator, critic.enable)",
        spared=("critic.enable",),
    ),
    Rule(
        (f"{REF}.*",),
        lambda run: not _role(run, "reference"),
        f"no reference model is built, neither algorithm.use_kl_in_reward nor {ACTOR}.use_kl_loss is on",
    ),
    Rule(
        (
            "reward_model.model.*",
            "reward_model.combine",
            *SPLIT_KEYS["reward_scores"],
            "reward_model.use_dynamic_bsz",
        ),
        lambda run: not _role(run, "reward"),
        "no reward model is built (reward_model.enable)",
    ),
    # KL
    Rule(
        ("algorithm.kl_ctrl.*", "algorithm.kl_penalty"),
        lambda run: not run.config.algorithm.use_kl_in_reward,
        "the KL penalty in the reward is off (algorithm.use_kl_in_reward)",
    ),
    Rule(
        ("algorithm.kl_ctrl.horizon", "algorithm.kl_ctrl.target_kl"),
        lambda run: run.config.algorithm.kl_ctrl.type == "fixed",
        "the KL coefficient is fixed (algorithm.kl_ctrl.type)",
    ),
    Rule(
        (f"{ACTOR}.kl_loss_coef", f"{ACTOR}.kl_loss_type"),
        lambda run: not run.config.actor_rollout_ref.actor.use_kl_loss,
        f"the KL loss is off ({ACTOR}.use_kl_loss)",
    ),
    # advantages and losses
    *(_loss_rule(name) for name in sorted({name for mode in LOSS_MODES.values() for name in mode.reads or ()})),
    *(_estimator_rule(name) for name in ("gamma", "lam", "norm_adv_by_std_in_grpo")),
    Rule(
        (f"{ACTOR}.clip_ratio",),
        lambda run: {f"{ACTOR}.clip_ratio_low", f"{ACTOR}.clip_ratio_high"} <= run.set_keys,
        "clip_ratio_low and clip_ratio_high stand for it",
    ),
    Rule(
        ("algorithm.filter_groups.*",),
        lambda run: not run.config.algorithm.filter_groups.enable,
        "groups are not filtered (algorithm.filter_groups.enable)",
        spared=("algorithm.filter_groups.enable",),
    ),
    Rule(
        ("reward_model.overlong_buffer.*",),
        lambda run: not run.config.reward_model.overlong_buffer.enable,
        "long responses are not penalised (reward_model.overlong_buffer.enable)",
        spared=("reward_model.overlong_buffer.enable",),
    ),
    Rule(
        (f"{CORRECTION}.*",),
        lambda run: run.config.algorithm.rollout_correction.level is None,
        f"the policy loss is not weighted ({CORRECTION}.level)",
        spared=(f"{CORRECTION}.level",),
    ),
    Rule(
        (f"{CORRECTION}.threshold_lower",),
        lambda run: run.config.algorithm.rollout_correction.mode == "clamp",
        f"weights are only cut from above ({CORRECTION}.mode=clamp)",
    ),
    # micro-batches and optimizers
    *(rule for name in SPLIT_KEYS for rule in _micro_batch_rules(name)),
    Rule(
        ("*.use_remove_padding",),
        lambda run: run.plan.device == "cpu",
        "on a CPU each micro-batch is padded to its longest sequence",
    ),
    Rule(("*.use_torch_compile",), lambda run: run.plan.device == "cpu", "nothing is compiled on a CPU"),
    *(rule for owner in (ACTOR, "critic") for rule in _optimizer_rules(owner)),
    # engine and sampling
    Rule(
        (
            f"{ROLLOUT}.tensor_model_parallel_size",
            f"{ROLLOUT}.gpu_memory_utilization",
            f"{ROLLOUT}.free_cache_engine",
            f"{ROLLOUT}.enforce_eager",
            f"{ROLLOUT}.dtype",
            f"{ROLLOUT}.load_format",
            f"{ROLLOUT}.update_weights_bucket_megabytes",
            f"{ROLLOUT}.engine_kwargs.*",
            "trainer.check_weights",
        ),
        lambda run: run.plan.engine == "hf",
        f"the embedded engine ({ROLLOUT}.name=hf) runs the trainer's own model in the trainer's process",
    ),
    Rule(
        tuple(
            f"{ROLLOUT}.{name}"
            for name in (
                "tensor_model_parallel_size",
                "gpu_memory_utilization",
                "free_cache_engine",
                "enforce_eager",
                "load_format",
                "max_num_seqs",
                "max_num_batched_tokens",
                "engine_kwargs.*",
            )
        ),
        lambda run: run.config.actor_rollout_ref.rollout.mode == "server",
        f"the servers ({ROLLOUT}.mode=server) are as they were started",
    ),
    Rule(
        tuple(f"{ROLLOUT}.{name}" for name in ("gpu_memory_utilization", "free_cache_engine", "enforce_eager")),
        lambda run: run.plan.device == "cpu",
        "on a CPU the engine has no GPU memory to share and no CUDA graphs",
    ),
    Rule(
        (f"{ROLLOUT}.engine_kwargs.vllm*",),
        lambda run: run.plan.engine == "sglang",
        f"they are vLLM's ({ROLLOUT}.name=sglang)",
    ),
    Rule(
        (f"{ROLLOUT}.engine_kwargs.sglang*",),
        lambda run: run.plan.engine == "vllm",
        f"they are SGLang's ({ROLLOUT}.name=vllm)",
    ),
    Rule(
        (f"{ROLLOUT}.server_*",),
        lambda run: run.config.actor_rollout_ref.rollout.mode == "colocated",
        f"the engine runs on the trainer's devices ({ROLLOUT}.mode=colocated)",
    ),
    Rule(
        (f"{ROLLOUT}.server_weights_dir",),
        lambda run: run.config.actor_rollout_ref.rollout.server_weight_update == "tensors",
        f"new weights go over HTTP ({ROLLOUT}.server_weight_update=tensors)",
    ),
    Rule(
        (f"{ROLLOUT}.update_weights_bucket_megabytes",),
        lambda run: (
            run.config.actor_rollout_ref.rollout.mode == "server"
            and run.config.actor_rollout_ref.rollout.server_weight_update == "disk"
        ),
        f"new weights go through a folder ({ROLLOUT}.server_weight_update=disk)",
    ),
    Rule(
        tuple(f"{ROLLOUT}.val_kwargs.{name}" for name in ("temperature", "top_p", "top_k")),
        lambda run: not run.config.actor_rollout_ref.rollout.val_kwargs.do_sample,
        f"validation is greedy ({ROLLOUT}.val_kwargs.do_sample=False)",
    ),
    # data, validation, saving
    Rule(
        ("trainer.log_val_generations",),
        lambda run: set(run.config.trainer.logger) <= {"file"},
        "no logger of this run shows samples (all but file do)",
    ),
    Rule(
        ("trainer.generations_format",),
        lambda run: not run.plan.validates_ever and run.config.trainer.rollout_data_dir is None,
        "no responses are written (trainer.rollout_data_dir, and nothing is validated)",
    ),
    Rule(("data.seed",), lambda run: not run.config.data.shuffle, "the data are not shuffled (data.shuffle)"),
    Rule(
        ("data.truncation",),
        lambda run: run.config.data.filter_overlong_prompts,
        "prompts over the limit are dropped (data.filter_overlong_prompts)",
    ),
    Rule(
        ("data.val_files",),
        lambda run: (
            bool(run.config.data.val_files) and not run.plan.validates_ever
        ),  # without files, that was asked for
        NOT_VALIDATED,
    ),
    Rule(
        ("data.val_*", f"{ROLLOUT}.val_kwargs.*", "trainer.validation_data_dir", "trainer.log_val_generations"),
        lambda run: not run.plan.validates_ever,
        NOT_VALIDATED,
        spared=("data.val_files",),
    ),
    Rule(
        ("trainer.max_ckpt_to_keep", "*.checkpoint.*"),
        lambda run: run.plan.save_freq <= 0,
        "no checkpoint is saved (trainer.save_freq)",
    ),
    *(_checkpoint_rule(owner) for owner in (ACTOR, "critic")),
    Rule(
        ("trainer.total_epochs",),
        lambda run: run.plan.asked_steps is not None,
        "trainer.total_training_steps says how long the run is",
    ),
    Rule(
        ("trainer.resume_from_path",),
        lambda run: run.config.trainer.resume_mode != "resume_path",
        "it is read with trainer.resume_mode=resume_path only",
    ),
    # rewards
    Rule(
        ("reward.*", "custom_reward_function.*", "reward_model.reward_manager"),
        lambda run: not run.config.uses_scorers,
        "the reward model's score is the only one (reward_model.combine=replace)",
    ),
    Rule(("reward_model.model.enable_gradient_checkpointing",), lambda run: True, "the reward model is never updated"),
    Rule(
        ("custom_reward_function.name", "custom_reward_function.reward_kwargs*"),
        lambda run: run.config.custom_reward_function.path is None,
        "there is no custom reward function (custom_reward_function.path)",
    ),
    Rule(
        ("reward.data_sources", *(f"reward.{name}.*" for name in SCORERS)),
        lambda run: run.config.custom_reward_function.path is not None,
        "custom_reward_function.path scores instead of the data source's scorer",
    ),
    Rule(
        ("reward.num_workers",),
        lambda run: run.config.reward_model.reward_manager == "batch",
        "reward_model.reward_manager=batch calls the reward function once a step, in one process",
    ),
    # one device, one process
    Rule(("*_offload",), lambda run: run.plan.device == "cpu", "on a CPU there is nowhere to offload to"),
    Rule(("*.fsdp_size", "*.reshard_after_forward"), _one_rank, "one device holds the whole model"),
    Rule((f"{REF}.fsdp_config.optimizer_offload",), lambda run: True, "the reference model has no optimizer"),
    Rule(("reward_model.model.fsdp_config.optimizer_offload",), lambda run: True, "the reward model has no optimizer"),
    Rule(("trainer.balance_batch",), _one_rank, "there is one rank"),
    Rule(
        ("ray_kwargs.*", "trainer.worker_timeout", "trainer.rollout_restarts"),
        lambda run: not run.plan.uses_ray,
        "everything runs in this process, without Ray (trainer.executor)",
    ),
    Rule(
        ("trainer.rollout_restarts",),
        lambda run: run.plan.uses_ray and run.plan.engine == "hf",
        "the embedded engine lives in the ranks, and is gone only with one",
    ),
)
