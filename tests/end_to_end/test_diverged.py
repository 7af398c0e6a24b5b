"""A run that diverges says so, ends with a code other than 0, and destroys nothing that it had."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from helpers import arguments, command, metrics_of, wait_for_steps

from verl.trainer.checkpoints import Checkpoints
from verl.trainer.main_ppo import main

HUGE = {"actor_rollout_ref__actor__optim__lr": 1e30, "trainer__total_training_steps": 4}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("mini_batch", [4, 8])
def test_a_good_checkpoint_outlives_a_run_that_diverges_whatever_the_limit(small, tmp_path, capsys, mini_batch):
    keep = {
        "trainer__save_freq": 1,
        "trainer__max_ckpt_to_keep": 1,
        "actor_rollout_ref__actor__ppo_mini_batch_size": mini_batch,
        "critic__ppo_mini_batch_size": 4,
    }
    assert main(arguments(small, tmp_path, **keep, trainer__total_training_steps=2)) == 0
    (good,) = Checkpoints(tmp_path).all()
    before = files_of(good.folder)
    capsys.readouterr()
    assert main(arguments(small, tmp_path, **keep, **HUGE)) == 1
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    assert "the actor has diverged" in said
    assert f"The last checkpoint before that is {good.folder}" in said
    assert files_of(good.folder) == before
    assert main(arguments(small, tmp_path, **keep, trainer__total_training_steps=3)) == 0
    assert [checkpoint.step for checkpoint in Checkpoints(tmp_path).all()] == [3]


def test_a_critic_that_diverges_ends_the_run(small, tmp_path, capsys):
    assert main(arguments(small, tmp_path, critic__optim__lr=1e30, trainer__total_training_steps=4)) == 1
    said = "".join(capsys.readouterr())
    assert "Traceback" not in said
    assert "the critic" in said
    assert "critic.optim.lr=1e+30" in said
    assert "No checkpoint was written before that" in said


def test_the_second_run_in_a_folder_is_refused_and_a_dead_ones_folder_is_taken_over(small, tmp_path, capsys):
    def output() -> str:
        return first.communicate()[0]

    keys = {"trainer__total_training_steps": 500, "trainer__save_freq": 1, "trainer__max_ckpt_to_keep": 1}
    first = subprocess.Popen(
        command(arguments(small, tmp_path, **keys)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        wait_for_steps(first, tmp_path, 1, output)
        config, code = (tmp_path / "config.yaml").read_bytes(), main(arguments(small, tmp_path))
        said = "".join(capsys.readouterr())
        assert code == 1
        assert f"process {first.pid} on {socket.gethostname()}" in said
        assert "Traceback" not in said
        assert (tmp_path / "config.yaml").read_bytes() == config
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.communicate()
    steps = len(metrics_of(tmp_path))
    assert main(arguments(small, tmp_path, trainer__total_training_steps=steps + 1)) == 0
    assert metrics_of(tmp_path)[-1]["step"] == steps + 1
    assert not (tmp_path / ".run.json").exists()


def test_only_a_sound_checkpoint_takes_the_place_of_others(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=1)
    for step, sound in [(1, True), (2, False), (3, False)]:
        checkpoints.save(step, lambda folder: None, {"step": step, "sound": sound})
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [1, 2, 3]
    assert checkpoints.where_to_resume() == f"The last checkpoint before that is {tmp_path / 'global_step_1'}"
    checkpoints.save(4, lambda folder: None, {"step": 4, "sound": True})
    assert [checkpoint.step for checkpoint in checkpoints.all()] == [4]


def test_a_checkpoint_of_before_says_nothing_of_soundness_and_counts_as_sound(tmp_path):
    checkpoint = Checkpoints(tmp_path).save(1, lambda folder: None, {"step": 1})
    assert json.loads((checkpoint.folder / "trainer.json").read_text()) == {"step": 1}
    assert checkpoint.sound
