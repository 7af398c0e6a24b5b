"""The PPO loop. A stage takes the step's table of samples and returns it with columns added."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa

from verl.algorithms.advantages import AdvantageInputs, resolve
from verl.algorithms.corrections import importance_weights
from verl.algorithms.kl import KLControl
from verl.algorithms.rewards import token_rewards
from verl.config.sections.models import Config
from verl.data.schema import ragged, with_columns
from verl.plan import RunPlan
from verl.tracking import Trackers
from verl.trainer.ppo.feed import Feed
from verl.trainer.ppo.metrics import step_metrics
from verl.trainer.ppo.run_state import RunState
from verl.trainer.ppo.samples import Samples
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.updates import Diverged, Updates
from verl.trainer.ppo.validation import Validation
from verl.trainer.ppo.weight_sync import WeightSync


class PPOTrainer:
    """``fit`` trains from ``step`` to the plan's last step. step: the last one that was begun; 0, or a checkpoint's.

    check_log_probs: compares engine and trainer before the first step, and returns what it found; None: no check.
    stop: called after each step. If it returns True, the run ends there, and what is due at the end is done.
    """

    def __init__(
        self,
        config: Config,
        plan: RunPlan,
        *,
        stages: Stages,
        feed: Feed,
        weight_sync: WeightSync,
        validation: Validation,
        state: RunState,
        samples: Samples,
        kl_control: KLControl,
        trackers: Trackers,
        check_log_probs: Callable[[StepLog], str] | None = None,
        stop: Callable[[], bool] = lambda: False,
        step: int = 0,
    ):
        self.config, self.plan, self.step, self.stop = config, plan, step, stop
        self.stages, self.feed, self.weight_sync, self.validation = stages, feed, weight_sync, validation
        self.state, self.samples, self.kl_control, self.trackers = state, samples, kl_control, trackers
        self.check_log_probs, self.updates = check_log_probs, Updates(config, plan, stages)
        self.estimator = resolve(config.algorithm.adv_estimator)

    def fit(self) -> bool:
        """True if the last step was reached. SaveError if the last checkpoint that was due could not be written."""
        self.start()
        stopping = self.stop()
        while self.step < self.plan.last_step and not stopping:
            self.step += 1
            log = StepLog()
            with log.timer("step"):
                table = self.train_step(log)
                if self.plan.validates(self.step):
                    self.validation.run(self.step, log)
            self.report(table, log)  # before saving, so that a run resumed from the checkpoint has this step's metrics
            stopping = self.stop()
            if self.plan.saves(self.step) or self.state.unsaved or (stopping and self.plan.save_freq > 0):
                self.save(table, log)
        if self.state.unsaved:
            raise self.state.unsaved
        return self.step == self.plan.last_step

    def train_step(self, log: StepLog) -> pa.Table:
        table = self.feed.take(self.step, log)  # responses and their scores
        table = self.stages.forward(log, "old_log_prob", "actor", "old_log_probs", table)
        table = self.rollout_correction(table, log)
        table = self.ref_log_probs(table, log)
        table = self.values(table, log)
        table = self.advantages(table, log)
        try:
            self.updates.critic(table, self.step, log)
            self.updates.actor(table, self.step, log)
        except Diverged as error:
            raise Diverged(f"{error} {self.state.where_to_resume()}.") from error
        self.update_rollout_weights(log)
        return table

    def rollout_correction(self, table: pa.Table, log: StepLog) -> pa.Table:
        """Importance weights for the difference between the engine's probabilities and the trainer's, if asked for."""
        settings = self.config.algorithm.rollout_correction
        if settings.level is None:
            return table
        old, rollout, mask = (ragged(table, name) for name in ("old_log_probs", "rollout_log_probs", "response_mask"))
        weights, metrics = importance_weights(old, rollout, mask, settings)
        log.set(metrics)
        return with_columns(table, rollout_is_weights=weights)

    def ref_log_probs(self, table: pa.Table, log: StepLog) -> pa.Table:
        if "reference" not in self.plan.roles:
            return table
        return self.stages.forward(log, "ref", "reference", "ref_log_probs", table)

    def values(self, table: pa.Table, log: StepLog) -> pa.Table:
        if "critic" not in self.plan.roles:
            return table
        return self.stages.forward(log, "values", "critic", "values", table)

    def advantages(self, table: pa.Table, log: StepLog) -> pa.Table:
        """Token rewards, advantages and returns."""
        with self.stages.stage(log, "adv"):
            rewards, metrics = token_rewards(table, self.config, self.kl_control)
            log.set(metrics)
            inputs = AdvantageInputs(
                token_rewards=rewards,
                response_mask=ragged(table, "response_mask"),
                values=ragged(table, "values") if "values" in table.column_names else None,
                group=table["group"].to_numpy(),
                settings=self.config.algorithm,
                greedy_rewards=table["greedy_reward"].to_numpy() if self.estimator.needs_greedy else None,
            )
            advantages, returns = self.estimator(inputs)
            return with_columns(table, token_rewards=rewards, advantages=advantages, returns=returns)

    def update_rollout_weights(self, log: StepLog) -> None:
        self.weight_sync.send(log, self.step)
        self.feed.released(self.step)

    # ---- around the steps

    def start(self) -> None:
        """Weights to the engine, the log-prob check, and the validation before training."""
        log = StepLog()
        self.update_rollout_weights(log)
        if self.check_log_probs is not None:
            found = self.check_log_probs(log)
            if self.stages.runtime.rollout.capabilities.sleep:
                self.update_rollout_weights(log)
            self.stages.runtime.progress.note(found)
        if self.step == 0 and self.plan.validates(0):
            self.validation.run(0, log)
            self.trackers.log(log.metrics, 0)

    def report(self, table: pa.Table, log: StepLog) -> None:
        log.set(step_metrics(table, self.plan, self.stages.runtime.workers, log.timer.seconds, self.step))
        self.trackers.log(log.metrics, self.step)
        self.samples.write_training(table, self.step)

    def save(self, table: pa.Table, log: StepLog) -> None:
        self.state.save(self.step, table, log, sound=not self.updates.last_skipped)
        self.trackers.log({"timing_s/save_checkpoint": log.timer.seconds["save_checkpoint"]}, self.step)
