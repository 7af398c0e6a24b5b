"""Checks of settings against each other: batch arithmetic, contradictions, lengths. No file is read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from verl.algorithms import loss_modes
from verl.algorithms.advantages import resolve
from verl.errors import UserError
from verl.findings import Findings
from verl.plan import MicroBatching, RunPlan, needs_critic

if TYPE_CHECKING:
    from verl.config.sections.generation import GenerationDataConfig
    from verl.config.sections.models import Config, DataConfig, EngineConfig

ACTOR = "actor_rollout_ref.actor"
ROLLOUT = "actor_rollout_ref.rollout"
REF = "actor_rollout_ref.ref"

# Name of the micro-batches -> the keys of their size in sequences and in tokens.
SPLIT_KEYS = {
    "actor": (f"{ACTOR}.ppo_micro_batch_size_per_gpu", f"{ACTOR}.ppo_max_token_len_per_gpu"),
    "critic": ("critic.ppo_micro_batch_size_per_gpu", "critic.ppo_max_token_len_per_gpu"),
    "old_log_probs": (f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", f"{ROLLOUT}.log_prob_max_token_len_per_gpu"),
    "ref_log_probs": (f"{REF}.log_prob_micro_batch_size_per_gpu", f"{REF}.log_prob_max_token_len_per_gpu"),
    "reward_scores": ("reward_model.micro_batch_size_per_gpu", "reward_model.forward_max_token_len_per_gpu"),
    "values": ("critic.forward_micro_batch_size_per_gpu", "critic.forward_max_token_len_per_gpu"),
}


def check_settings(findings: Findings, config: Config, plan: RunPlan) -> None:
    _mini_batches(findings, config, plan)
    _micro_batches(findings, plan)
    _steps(findings, config, plan)
    check_lengths(findings, config.data, config.actor_rollout_ref.rollout)
    _sampling(findings, config)
    _algorithm(findings, config, plan)
    _dapo(findings, config, plan)
    _trainer(findings, config, plan)


def splits(plan: RunPlan) -> dict[str, MicroBatching]:
    """The micro-batches of a rank, by the names of SPLIT_KEYS."""
    updates = {"actor": plan.actor.micro_batching} | ({"critic": plan.critic.micro_batching} if plan.critic else {})
    return updates | plan.forwards


# -- batch arithmetic --------------------------------------------------------------------------------------------------


def _mini_batches(findings: Findings, config: Config, plan: RunPlan) -> None:
    """Checks that a step's prompts are whole mini-batches, and that a mini-batch's trajectories divide evenly among
    the ranks."""
    sizes = {f"{ACTOR}.ppo_mini_batch_size": config.actor_rollout_ref.actor.ppo_mini_batch_size}
    if plan.critic and config.critic.ppo_mini_batch_size not in sizes.values():
        sizes["critic.ppo_mini_batch_size"] = config.critic.ppo_mini_batch_size
    for key, size in sizes.items():
        batch, samples, world = plan.prompts, plan.samples, plan.world_size
        fix = _fix_mini_batch(size, plan)
        if size > batch:
            findings.problem(key, size, f"a step has only data.train_batch_size={batch} prompts", fix)
        elif batch % size:
            why = f"data.train_batch_size={batch} is not a multiple of it: {batch % size} prompts would be left over"
            findings.problem(key, size, why, fix)
        elif size * samples < world:
            why = f"its {size * samples} trajectories (× {ROLLOUT}.n={samples}) leave some of {world} ranks idle"
            findings.problem(key, size, why, fix)
        elif size * samples % world:
            why = f"its {size * samples} trajectories (× {ROLLOUT}.n={samples}) do not spread over {world} ranks"
            findings.problem(key, size, why, fix)


def _fix_mini_batch(size: int, plan: RunPlan) -> str:
    """How to fix it: the nearest size that works with this batch, or the nearest batch that works with this size."""
    working = [m for m in _divisors(plan.prompts) if m * plan.samples % plan.world_size == 0]
    fixes = [f"set it to {min(working, key=lambda m: abs(m - size))}"] if working else []
    if size * plan.samples % plan.world_size == 0:
        fixes.append(f"set data.train_batch_size to {max(1, round(plan.prompts / size)) * size}")
    return ", or ".join(fixes) or f"make the batch and the mini-batch multiples of {plan.world_size}"


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _micro_batches(findings: Findings, plan: RunPlan) -> None:
    longest = plan.max_prompt_length + plan.max_response_length
    for name, split in splits(plan).items():
        size_key, tokens_key = SPLIT_KEYS[name]
        if split.max_tokens is not None and split.max_tokens < longest:
            findings.warn(
                f"{tokens_key}={split.max_tokens} is less than data.max_prompt_length + data.max_response_length = "
                f"{longest}: a longer sequence makes a micro-batch by itself."
            )
        if split.capped:
            of = "a mini-batch" if name in ("actor", "critic") else "a step's trajectories"
            findings.note(
                f"{size_key}: {split.micro_batch_size} instead of {split.configured}, a rank's whole share of {of}."
            )


def _steps(findings: Findings, config: Config, plan: RunPlan) -> None:
    if plan.steps_per_epoch == 0:
        findings.problem(
            "data.train_batch_size",
            plan.prompts,
            f"the training data have {plan.train_rows} rows: no step could be filled",
            f"set it to at most {plan.train_rows} (and {ACTOR}.ppo_mini_batch_size to no more than that)",
        )
        return
    total = plan.total_steps
    if total is None:
        return
    if plan.critic and plan.critic_warmup > total:
        findings.warn(
            f"trainer.critic_warmup={plan.critic_warmup} is past the last step ({total}): the actor never trains."
        )
    optims = {ACTOR: config.actor_rollout_ref.actor.optim} | ({"critic": config.critic.optim} if plan.critic else {})
    for owner, optim in optims.items():
        if optim.lr_warmup_steps >= total:
            findings.warn(
                f"{owner}.optim.lr_warmup_steps={optim.lr_warmup_steps} is not less than the run's {total} steps: "
                f"the learning rate never reaches {optim.lr:g}."
            )


def check_lengths(findings: Findings, data: DataConfig | GenerationDataConfig, rollout: EngineConfig) -> None:
    longest = data.max_prompt_length + data.max_response_length
    if rollout.max_model_len is not None and rollout.max_model_len < longest:
        findings.problem(
            f"{ROLLOUT}.max_model_len",
            rollout.max_model_len,
            f"data.max_prompt_length + data.max_response_length = {longest} tokens do not fit",
            f"set it to at least {longest}, or shorten prompts or responses",
        )


def check_context(
    findings: Findings, data: DataConfig | GenerationDataConfig, key: str, max_positions: int | None
) -> None:
    """key: of the model's path. max_positions: max_position_embeddings of the model's config.json."""
    longest = data.max_prompt_length + data.max_response_length
    if max_positions is None or longest <= max_positions:
        return
    room = max_positions - data.max_prompt_length
    fix = f"set it to at most {room}" if room > 0 else f"make both together at most {max_positions}"
    findings.problem(
        "data.max_response_length",
        data.max_response_length,
        f"with data.max_prompt_length={data.max_prompt_length} that is {longest} tokens; {key} takes {max_positions}",
        fix,
    )


# -- contradictions ----------------------------------------------------------------------------------------------------


def _sampling(findings: Findings, config: Config) -> None:
    rollout = config.actor_rollout_ref.rollout
    validation = rollout.val_kwargs
    if validation.n > 1 and not validation.do_sample:
        findings.problem(
            f"{ROLLOUT}.val_kwargs.n",
            validation.n,
            "without do_sample all of a prompt's validation responses are the same",
            f"set {ROLLOUT}.val_kwargs.do_sample=True (and a temperature), or n=1",
        )
    if validation.do_sample and validation.temperature <= 0:
        findings.problem(
            f"{ROLLOUT}.val_kwargs.temperature",
            validation.temperature,
            "do_sample=True needs a temperature above 0",
            f"set it to 1, or {ROLLOUT}.val_kwargs.do_sample=False for greedy validation",
        )
    if rollout.min_new_tokens > config.data.max_response_length:
        findings.problem(
            f"{ROLLOUT}.min_new_tokens",
            rollout.min_new_tokens,
            f"a response has at most data.max_response_length={config.data.max_response_length} tokens",
            f"set it to {config.data.max_response_length} or less",
        )
    if rollout.ignore_eos:
        findings.warn(
            f"{ROLLOUT}.ignore_eos=True: every response runs on to data.max_response_length; meant for benchmarks."
        )


def _algorithm(findings: Findings, config: Config, plan: RunPlan) -> None:
    algorithm, actor = config.algorithm, config.actor_rollout_ref.actor
    try:
        estimator = resolve(algorithm.adv_estimator)
    except UserError as error:
        fix = "set it to grpo, or (with a critic) gae"
        findings.problem("algorithm.adv_estimator", algorithm.adv_estimator, str(error), fix)
    else:
        if estimator.compares_group and plan.samples == 1:
            findings.warn(
                f"algorithm.adv_estimator={estimator.name} compares a prompt's responses with each other, and "
                f"{ROLLOUT}.n=1: the advantage is the bare score. Set n to 4 or more."
            )
    try:
        loss_modes.resolve(actor.policy_loss.loss_mode)
    except UserError as error:
        findings.problem(loss_modes.KEY, actor.policy_loss.loss_mode, str(error), "set it to vanilla, the loss of PPO")
    if actor.policy_loss.loss_mode == "gspo" and actor.clip_ratio_high > 0.01:
        findings.warn(
            f"{loss_modes.KEY}=gspo clips the mean ratio of a response, which is far nearer to 1 than a token's: "
            f"{ACTOR}.clip_ratio_high={actor.clip_ratio_high} clips next to nothing. Its paper has clip_ratio_low=3e-4 "
            "and clip_ratio_high=4e-4."
        )
    if config.critic.enable is False and needs_critic(config):
        why = f"algorithm.adv_estimator={algorithm.adv_estimator} needs a critic's values"
        fix = "leave it unset, or set algorithm.adv_estimator=grpo"
        findings.problem("critic.enable", config.critic.enable, why, fix)
    if plan.critic and not needs_critic(config):
        findings.warn(
            f"critic.enable=True trains a critic that algorithm.adv_estimator={algorithm.adv_estimator} never asks."
        )
    if actor.use_kl_loss and actor.kl_loss_coef == 0:
        findings.warn(f"{ACTOR}.use_kl_loss=True with kl_loss_coef=0: a reference model only to measure the KL.")
    if algorithm.use_kl_in_reward and algorithm.kl_ctrl.kl_coef == 0:
        findings.warn("algorithm.use_kl_in_reward with kl_ctrl.kl_coef=0: a reference model only to measure the KL.")
    if algorithm.use_kl_in_reward and actor.use_kl_loss:
        findings.warn(f"the KL to the reference counts twice: in the reward and in the loss ({ACTOR}.use_kl_loss).")


def _dapo(findings: Findings, config: Config, plan: RunPlan) -> None:
    overlong, longest = config.reward_model.overlong_buffer, config.data.max_response_length
    if overlong.enable and not 1 <= overlong.len <= longest:
        findings.problem(
            "reward_model.overlong_buffer.len",
            overlong.len,
            f"the penalty grows over the last tokens of data.max_response_length={longest}",
            f"set it to a number from 1 to {longest}, a fifth of it or so",
        )
    groups = config.algorithm.filter_groups
    if groups.enable and groups.metric != "score" and not config.uses_scorers:
        findings.problem(
            "algorithm.filter_groups.metric",
            groups.metric,
            "only scorers give such numbers, and the reward model's score replaces theirs",
            "set it to score, or reward_model.combine=add",
        )
    if groups.enable and plan.samples == 1:
        findings.problem(
            f"{ROLLOUT}.n",
            plan.samples,
            "algorithm.filter_groups.enable=True looks for prompts whose responses differ, and there is one response",
            "set it to 4 or more, or algorithm.filter_groups.enable=False",
        )


def _trainer(findings: Findings, config: Config, plan: RunPlan) -> None:
    trainer = config.trainer
    if plan.validates_ever and not config.data.val_files:
        asked = "trainer.test_freq" if trainer.test_freq > 0 else "trainer.val_before_train"
        findings.problem(
            "data.val_files",
            config.data.val_files,
            f"{asked} asks for validation",
            "name a file, or set test_freq=-1 and val_before_train=False",
        )
    if trainer.resume_mode == "resume_path" and not trainer.resume_from_path:
        fix = "name a folder .../global_step_N, or set trainer.resume_mode=auto"
        findings.problem("trainer.resume_from_path", None, "trainer.resume_mode=resume_path needs it", fix)
    if trainer.default_hdfs_dir is not None:
        fix = "set it to null and copy the run folder when the run has ended"
        findings.problem(
            "trainer.default_hdfs_dir", trainer.default_hdfs_dir, "checkpoints go to local folders only", fix
        )
    sections = {ACTOR: config.actor_rollout_ref.actor.fsdp_config, "critic.model": config.critic.model.fsdp_config}
    sections |= {REF: config.actor_rollout_ref.ref.fsdp_config}
    sections |= {"reward_model.model": config.reward_model.model.fsdp_config}
    for owner, fsdp in sections.items():
        if fsdp.fsdp_size > 0 and plan.world_size % fsdp.fsdp_size:
            why = f"it does not divide the {plan.world_size} ranks"
            findings.problem(
                f"{owner}.fsdp_config.fsdp_size", fsdp.fsdp_size, why, "set it to -1, or to a divisor of them"
            )
    if plan.device == "cpu" and config.actor_rollout_ref.actor.fsdp_config.dtype == "bfloat16":
        findings.warn(f"{ACTOR}.fsdp_config.dtype=bfloat16 on a CPU: slower there than float32, and less exact.")
