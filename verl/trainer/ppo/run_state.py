"""A run's state in its checkpoints: models, optimizers and schedules, and the positions of everything random."""

from __future__ import annotations

from pathlib import Path

from verl.algorithms.kl import KLControl
from verl.trainer.checkpoints import Checkpoint, Checkpoints, SaveError
from verl.trainer.ppo.feed import Feed
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog


class RunState:
    """unsaved: why the last checkpoint that was due could not be written; None if it was."""

    def __init__(self, checkpoints: Checkpoints, stages: Stages, feed: Feed, kl_control: KLControl):
        self._checkpoints, self._stages, self._feed, self._kl_control = checkpoints, stages, feed, kl_control
        self.unsaved: SaveError | None = None

    def save(self, step: int, log: StepLog) -> None:
        """Writes a checkpoint. A disk that is full does not end the run: ``unsaved`` then says why, and the trainer
        tries again after each step."""
        state = {"step": step, "loader": self._feed.state_dict(), "kl_control": self._kl_control.state_dict()}
        with self._stages.stage(log, "save_checkpoint"):
            try:
                self._checkpoints.save(step, self._write_models, state)
                self.unsaved = None
            except SaveError as error:
                self.unsaved = error
                progress = self._stages.runtime.progress
                progress.warn(f"{error}. Training goes on; saving is tried again after each step.")

    def _write_models(self, folder: Path) -> None:
        self._stages.phases.update()  # after a validation the whole engine is awake, and an export loads models
        self._stages.runtime.workers.call("save", folder).result()

    def restore(self, checkpoint: Checkpoint) -> int:
        """The step of the checkpoint."""
        state = checkpoint.state()
        self._feed.load_state_dict(state["loader"])
        self._kl_control.load_state_dict(state["kl_control"])
        self._stages.runtime.workers.call("restore", checkpoint.folder).result()
        return state["step"]
