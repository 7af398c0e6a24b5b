"""The plan of a run as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from verl.algorithms.advantages import ESTIMATORS
from verl.checks.host_memory import budget_table
from verl.checks.preflight import check
from verl.config.loading.problems import report
from verl.findings import Findings
from verl.memory.host_budget import budget_of_run
from verl.plan import MicroBatching, RunPlan, UpdatePlan

if TYPE_CHECKING:
    from verl.config.loading.load import Loaded
    from verl.config.sections.models import Config

UNKNOWN = "unknown until the data can be read"
Section = list[tuple[str, str]]


def print_plan(loaded: Loaded[Config]) -> int:
    """The exit code of PPO's dry run, see ``print_dry_run``."""
    plan, findings = check(loaded, dry_run=True)
    return print_dry_run(None if loaded.config is None else plan_text(loaded.config, plan), findings)


def print_dry_run(plan: str | None, findings: Findings) -> int:
    """The exit code: 1 if there are problems, else 0. Prints the plan and then all findings.

    plan: None if the settings could not be read.
    """
    print(*([] if plan is None else [plan]), findings_text(findings), sep="\n\n")
    return 1 if findings.problems else 0


def plan_text(config: Config, plan: RunPlan) -> str:
    sections = {
        "Plan of the run": _setup(config, plan),
        "Each step": _step(config, plan),
        "The whole run": _whole(config, plan),
    }
    width = max(len(label) for rows in sections.values() for label, _ in rows)
    lines = []
    for title, rows in sections.items():
        lines += ["", title] + [f"  {label:<{width}}  {text}".rstrip() for label, text in rows]
    return "\n".join(lines[1:])


def findings_text(findings: Findings) -> str:
    """All findings as text, one paragraph per kind."""
    parts = []
    for title, texts in (
        ("Decided for you", findings.notices),
        ("Could not be checked", findings.unchecked),
        ("Warnings", findings.warnings),
    ):
        if texts:
            parts.append("\n".join([title, *(f"  - {text}" for text in texts)]))
    parts.append(report(findings.problems) if findings.problems else "No problem found.")
    return "\n\n".join(parts)


def _setup(config: Config, plan: RunPlan) -> Section:
    model = config.actor_rollout_ref.model.path
    device = "CPU" if plan.device == "cpu" else "GPU"
    if not plan.uses_ray:
        placement = f"one {device}, everything in this process"
    elif plan.world_size == 1:
        placement = f"one {device}, its rank a process under Ray"
    else:
        placement = (
            f"{plan.world_size} {device}s ({plan.nnodes} × {plan.devices_per_node} a node), one rank each, under Ray"
        )
    rows = [("model", model), ("placement", placement)]
    rows += [(f"builds {role}", why) for role, why in plan.roles.items()]
    actor = config.actor_rollout_ref.actor
    rows.append(("advantages", _advantages(config)))
    rows.append(("policy loss", f"{actor.policy_loss.loss_mode}, {actor.loss_agg_mode}"))
    rows.append(("rollout engine", _rollout(config, plan)))
    rows += _host_memory(config, plan)
    lengths = f"{plan.max_prompt_length:,} of prompt + {plan.max_response_length:,} of response"
    rows.append(("context", f"{plan.context_length:,} tokens ({lengths} at most)"))
    return rows


def _host_memory(config: Config, plan: RunPlan) -> Section:
    budget = budget_of_run(config, plan)
    if budget is None:
        return [("host memory", "unknown until the models' files can be read")]
    rows = [("host memory", f"of each machine {budget}")]
    if budget.kept and plan.device == "cuda":
        rows += [("", line) for line in budget_table(budget)]
    return rows


def _advantages(config: Config) -> str:
    name = config.algorithm.adv_estimator
    greedy = name in ESTIMATORS and ESTIMATORS[name].needs_greedy
    return f"{name}, with a greedy response to each prompt on top" if greedy else name


def _rollout(config: Config, plan: RunPlan) -> str:
    rollout = config.actor_rollout_ref.rollout
    if rollout.mode == "server":
        count = len(rollout.server_urls)
        servers = f"{count} server{'s' if count != 1 else ''} elsewhere"
        return f"{plan.engine}, on {servers}; weights by {rollout.server_weight_update}"
    size = "" if plan.tensor_parallel == 1 else f" of {plan.tensor_parallel} GPUs each (tensor parallel)"
    replicas = f"{plan.replicas} replica{'s' if plan.replicas != 1 else ''}{size}"
    return f"{plan.engine}, {replicas}, on the same devices as training"


def _step(config: Config, plan: RunPlan) -> Section:
    groups = config.algorithm.filter_groups
    drawn = f", sampled until so many have responses that differ in {groups.metric}" if groups.enable else ""
    samples = "1 response" if plan.samples == 1 else f"{plan.samples} responses"
    rows = [
        ("prompts", f"{plan.prompts:,}{drawn}"),
        ("trajectories", f"{plan.trajectories:,} ({samples} to each prompt)"),
    ]
    names = {
        "old_log_probs": "old log-probs",
        "ref_log_probs": "reference log-probs",
        "values": "values",
        "reward_scores": "reward model",
    }
    rows += [(names[name], f"per rank {_split(split)}") for name, split in plan.forwards.items()]
    if plan.critic:
        rows += _update("critic update", plan.critic)
    return rows + _update("actor update", plan.actor)


def _update(name: str, update: UpdatePlan) -> Section:
    batches = f"{update.mini_batches:,} mini-batches of {update.mini_batch_size:,} prompts"
    passes = "" if update.epochs == 1 else f" × {update.epochs} passes"
    return [
        (name, f"{update.optimizer_steps:,} optimizer steps: {batches}{passes}"),
        ("", f"per rank and mini-batch {_split(update.micro_batching)}"),
    ]


def _split(split: MicroBatching) -> str:
    rows = f"{split.rows:,} sequence{'s' if split.rows != 1 else ''}"
    if split.micro_batch_size is None:
        return f"{rows}, in micro-batches of up to {split.max_tokens:,} tokens"
    count = split.micro_batches
    capped = f" (capped, {split.configured} was asked for)" if split.capped else ""
    return f"{rows} = {count:,} micro-batch{'es' if count != 1 else ''} of {split.micro_batch_size:,}{capped}"


def _whole(config: Config, plan: RunPlan) -> Section:
    if plan.train_rows is None:
        rows = [("training rows", UNKNOWN), ("steps an epoch", UNKNOWN)]
    else:
        if config.algorithm.filter_groups.enable:
            epoch = f"{plan.steps_per_epoch:,} at most: prompts whose responses do not differ are used up, too"
        else:
            epoch = f"{plan.steps_per_epoch:,}, {plan.rows_left_out:,} rows left out of each"
        rows = [("training rows", f"{plan.train_rows:,}"), ("steps an epoch", epoch)]
    rows.append(("steps", _total(plan)))
    if plan.total_steps:
        rows.append(("optimizer steps", _optimizer_steps(plan)))
    rows.append(("validation", _schedule(plan, plan.validates, plan.test_freq) + _validation_size(plan)))
    rows.append(("checkpoints", _schedule(plan, plan.saves, plan.save_freq)))
    return rows


def _total(plan: RunPlan) -> str:
    if plan.total_steps is None:
        return f"{UNKNOWN} ({plan.total_epochs} epochs)"
    if plan.asked_steps is not None:
        return f"{plan.total_steps:,} (trainer.total_training_steps)"
    return f"{plan.total_steps:,} ({plan.total_epochs} epochs)"


def _optimizer_steps(plan: RunPlan) -> str:
    steps = range(1, (plan.total_steps or 0) + 1)
    actor = sum(plan.trains_actor(step) for step in steps) * plan.actor.optimizer_steps
    text = f"actor {actor:,}"
    if plan.critic:
        text += f", critic {len(steps) * plan.critic.optimizer_steps:,}"
    return text


def _schedule(plan: RunPlan, due: Callable[[int], bool], every: int) -> str:
    """When something happens: its steps if they are few, else the rule."""
    parts = ["before training"] if due(0) else []
    steps = [str(step) for step in plan.steps(due) if step]
    if plan.total_steps is None and every > 0:
        parts.append(f"every {every} steps and at the end")
    elif len(steps) > 6:
        parts.append(f"at steps {', '.join(steps[:3])}, ..., {steps[-1]}")
    elif steps:
        parts.append(f"at step{'s' if len(steps) > 1 else ''} {', '.join(steps)}")
    return " and ".join(parts) or "never"


def _validation_size(plan: RunPlan) -> str:
    if not plan.validates_ever or plan.val_rows is None:
        return ""
    times = "" if plan.val_samples == 1 else f" × {plan.val_samples} responses"
    return f" ({plan.val_rows:,} prompts{times})"
