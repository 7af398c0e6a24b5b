"""The optimizer steps of a step: its table in mini-batches, one optimizer step each."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from verl.algorithms.batches import mini_batches
from verl.algorithms.losses import loss_columns
from verl.config.sections.models import ActorConfig, Config, CriticConfig
from verl.data.schema import ragged, rows_of, with_columns
from verl.errors import UserError
from verl.plan import RunPlan, UpdatePlan
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog


class Diverged(UserError):  # noqa: N818
    """A model's weights or gradients are not finite numbers: training cannot go on."""


class Updates:
    """skipped: optimizer steps that were skipped because a gradient was not finite, by role, over the whole run.
    last_skipped: the roles whose last optimizer step was skipped."""

    def __init__(self, config: Config, plan: RunPlan, stages: Stages):
        self._config, self._plan, self._stages = config, plan, stages
        self.skipped: Counter[str] = Counter()
        self.last_skipped: set[str] = set()

    def critic(self, table: pa.Table, step: int, log: StepLog) -> None:
        if self._plan.critic:
            self._update("critic", self._plan.critic, self._config.critic, table, step, log)

    def actor(self, table: pa.Table, step: int, log: StepLog) -> None:
        """Leaves the actor's parameters on the device: the weight sync uses them next."""
        if self._plan.trains_actor(step):
            self._update("actor", self._plan.actor, self._config.actor_rollout_ref.actor, table, step, log)

    def _update(
        self,
        role: str,
        plan: UpdatePlan,
        settings: ActorConfig | CriticConfig,
        table: pa.Table,
        step: int,
        log: StepLog,
    ) -> None:
        """All optimizer steps of one model in this step.

        Metrics are means over the optimizer steps; ``{role}/skipped_steps`` counts those that were skipped."""
        workers, seed = self._stages.runtime.workers, self._config.trainer.seed
        batches = mini_batches(
            table["group"].to_numpy(),
            plan.mini_batch_size,
            epochs=plan.epochs,
            shuffle=settings.shuffle,
            seed=seed,
            step=step,
        )
        found: dict[str, list[float]] = defaultdict(list)
        with self._stages.computing(
            log, f"update_{role}", role, total=len(batches), optimizer=True, stays_loaded=role == "actor"
        ) as progress:
            for number, rows in enumerate(batches):
                mini = rows_of(table, rows)
                columns = loss_columns(mini, settings, self._plan.max_response_length, (seed, step, number))
                mini = with_columns(mini, **columns)
                tokens = max(int(ragged(mini, "response_mask").values.sum()), 1)
                metrics = workers.reduce(f"update_{role}", mini, num_tokens=tokens).result()
                for name, value in metrics.items():
                    found[name].append(value)
                progress.advance()
            workers.call("step_schedule", role).result()
        skipped = found.pop(f"{role}/skipped_steps")
        log.set({name: float(np.mean(values)) for name, values in found.items()})
        log.set({f"{role}/skipped_steps": sum(skipped)})
        self._note_skipped(role, settings, step, skipped)

    def _note_skipped(
        self, role: str, settings: ActorConfig | CriticConfig, step: int, skipped: Sequence[float]
    ) -> None:
        """A warning at the first skipped optimizer step of a role. Diverged if a step's are all skipped."""
        section = {"actor": "actor_rollout_ref.actor", "critic": "critic"}[role]
        advice = f"Lower {section}.optim.lr={settings.optim.lr:g}, or look at the rewards and advantages"
        (self.last_skipped.add if skipped[-1] else self.last_skipped.discard)(role)
        if all(skipped):
            raise Diverged(
                f"step {step}: all {len(skipped)} optimizer steps of the {role} were skipped, because their gradients "
                f"are not finite. The {role} has diverged. {advice}."
            )
        if any(skipped) and not self.skipped[role]:
            self._stages.runtime.progress.warn(
                f"step {step}: {sum(skipped):.0f} of {len(skipped)} optimizer steps of the {role} were skipped, "
                f"because their gradients are not finite. {advice}. Later ones are counted in {role}/skipped_steps."
            )
        self.skipped[role] += int(sum(skipped))
