"""What a run says at its end."""

from __future__ import annotations

from pathlib import Path

from verl.config.loading.load import load
from verl.trainer.checkpoints import Checkpoint
from verl.trainer.runs import closing_words


def words(*kept: Checkpoint, finished: bool = True) -> str:
    trainer = load(["actor_rollout_ref.model.path=some/model"]).draft.trainer
    return closing_words(trainer, Path("run"), list(kept), 4, finished)


def test_a_run_that_saved_nothing_says_so():
    assert words() == "Finished after step 4. All files are in run; no checkpoint was saved (trainer.save_freq)."
    kept = Checkpoint(Path("run/global_step_4"), 4)
    assert words(kept) == "Finished after step 4. All files are in run, the last checkpoint in global_step_4."
