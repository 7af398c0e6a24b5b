"""A run's state in its checkpoints: models, optimizers and schedules, and the positions of everything random."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from verl.algorithms.kl import KLControl
from verl.data.schema import ragged
from verl.errors import Diverged
from verl.trainer.checkpoints import Checkpoint, Checkpoints, SaveError
from verl.trainer.ppo.feed import Feed
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.worker import SEQUENCES
from verl.trainer.soundness import broken_log_probs


class RunState:
    """unsaved: why the last checkpoint that was due could not be written; None if it was."""

    def __init__(
        self, checkpoints: Checkpoints, stages: Stages, feed: Feed, kl_control: KLControl, *, has_critic: bool
    ):
        self._checkpoints, self._stages, self._feed, self._kl_control = checkpoints, stages, feed, kl_control
        self._forwards = [("actor", "old_log_probs", "old_log_probs")]
        self._forwards += [("critic", "values", "values")] if has_critic else []
        self.unsaved: SaveError | None = None

    def save(self, step: int, table: pa.Table, log: StepLog, *, sound: bool) -> None:
        """Writes a checkpoint. A disk that is full does not end the run: ``unsaved`` then says why, and the trainer
        tries again after each step.

        Diverged, with nothing written, if a model cannot compute any more. table: of the step. sound: the last
        optimizer steps were not skipped."""
        state = {"step": step, "loader": self._feed.state_dict(), "kl_control": self._kl_control.state_dict()}
        state["sound"] = sound
        with self._stages.stage(log, "save_checkpoint"):
            self._stages.phases.update()  # after a validation the whole engine is awake, and the check loads models
            self._check_models(step, table)
            try:
                self._checkpoints.save(step, self._write_models, state)
                self.unsaved = None
            except SaveError as error:
                self.unsaved = error
                progress = self._stages.runtime.progress
                progress.warn(f"{error}. Training goes on; saving is tried again after each step.")

    def _check_models(self, step: int, table: pa.Table) -> None:
        """Diverged if a parameter is broken, or what a model computes for a few rows of the step."""
        workers = self._stages.runtime.workers
        rows = table.select(SEQUENCES).slice(0, workers.world_size)
        for role, method, column in self._forwards:
            with self._stages.loaded(role):
                why = next(filter(None, workers.call("broken_parameter", role).result()), "")
                if not why:
                    found = ragged(workers.map(method, rows).result(), column).values
                    if role == "actor":
                        why = broken_log_probs(found)
                    elif not np.isfinite(found).all():
                        why = "its values are not finite"
            if why:
                raise Diverged(
                    f"step {step}: the {role} has diverged: {why}. Nothing was saved. "
                    f"{self._checkpoints.where_to_resume()}; go on from there with a lower learning rate."
                )

    def _write_models(self, folder: Path) -> None:
        self._stages.runtime.workers.call("save", folder).result()

    def where_to_resume(self) -> str:
        return self._checkpoints.where_to_resume()

    def restore(self, checkpoint: Checkpoint) -> int:
        """The step of the checkpoint."""
        state = checkpoint.state()
        self._feed.load_state_dict(state["loader"])
        self._kl_control.load_state_dict(state["kl_control"])
        self._stages.runtime.workers.call("restore", checkpoint.folder).result()
        return state["step"]
