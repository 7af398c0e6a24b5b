import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from forks import run_forked
from helpers import arguments, command, metrics_of, repeatable
from safetensors import safe_open

from verl.trainer.checkpoints import Checkpoints
from verl.trainer.main_ppo import main
from verl.trainer.ppo.feed import SynchronousFeed
from verl.trainer.ppo.run_state import RunState
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.validation import Validation

STAGES = [
    "gen",
    "reward",
    "old_log_prob",
    "ref",
    "values",
    "adv",
    "update_critic",
    "update_actor",
    "update_weights",
    "testing",
    "save_checkpoint",
]
LONG_RUN = {
    "trainer__total_training_steps": len(STAGES) + 1,
    "trainer__save_freq": 1,
    "trainer__test_freq": 1,
    "trainer__max_ckpt_to_keep": 2,
    "algorithm__kl_ctrl__kl_coef": 0.01,
    "algorithm__kl_ctrl__type": "adaptive",
    "actor_rollout_ref__actor__shuffle": True,
    "actor_rollout_ref__actor__optim__lr_scheduler_type": "cosine",
}


def run_until(stage: str, step: int, arguments: list[str]) -> int:
    """The run, which ends with SIGKILL on entering (or, for "save_checkpoint", halfway through) a stage of a step."""
    take, validate = SynchronousFeed.take, Validation.run
    enter, write = Stages.stage, RunState._write_models
    under_way = 0  # the step

    def kill_at(name: str) -> None:
        if (name, under_way) == (stage, step):
            os.kill(os.getpid(), signal.SIGKILL)

    def noting_the_step(self, of, log):
        nonlocal under_way
        under_way = of
        return take(self, of, log)

    def killed_on_entering(self, log, name, total=None):
        if name != "save_checkpoint":
            kill_at(name)
        return enter(self, log, name, total)

    def killed_on_validating(self, of, log):
        kill_at("testing")
        return validate(self, of, log)

    def killed_while_writing(self, folder):
        write(self, folder)
        kill_at("save_checkpoint")

    SynchronousFeed.take, Stages.stage, Validation.run = noting_the_step, killed_on_entering, killed_on_validating
    RunState._write_models = killed_while_writing
    return main(arguments)


def tensors_of(run: Path) -> dict[str, torch.Tensor]:
    newest = Checkpoints(run).all()[-1].folder
    found = {}
    for file in sorted(newest.rglob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {f"{file.relative_to(newest)}:{name}": tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    return found


def test_a_run_killed_in_every_stage_ends_with_the_same_bits(small, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run_forked(main, arguments(small, whole, **LONG_RUN))
    assert done.returncode == 0, done.stderr
    for step, stage in enumerate(STAGES, start=1):
        ended = run_forked(run_until, stage, step, arguments(small, killed, **LONG_RUN))
        assert ended.returncode == -signal.SIGKILL, (stage, ended.stderr)
    assert run_forked(main, arguments(small, killed, **LONG_RUN)).returncode == 0

    timed = {name for step in metrics_of(whole) for name in step if name.startswith("timing_s/")}
    assert timed == {f"timing_s/{stage}" for stage in [*STAGES, "step"]}  # no stage is forgotten here
    assert repeatable(metrics_of(killed)) == repeatable(metrics_of(whole))
    ours, theirs = tensors_of(killed), tensors_of(whole)
    assert ours.keys() == theirs.keys()
    assert len(ours) > 50
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(small, tmp_path, capsys):
    keys = {"trainer__save_freq": 1, "trainer__val_before_train": False}
    assert main(arguments(small, tmp_path, **keys, trainer__total_training_steps=2)) == 0
    before = repeatable(metrics_of(tmp_path))
    victim = next((tmp_path / "global_step_2" / "actor").glob("*.safetensors"))
    with victim.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(b"\xff" * 8)
    capsys.readouterr()
    assert main(arguments(small, tmp_path, **keys, trainer__total_training_steps=2)) == 0
    said = capsys.readouterr().out
    assert "global_step_2 is damaged" in said
    assert "going on from" in said
    assert "global_step_1" in said
    assert repeatable(metrics_of(tmp_path)) == before


def test_a_finished_run_is_not_run_again_and_disable_starts_anew(small, tmp_path, capsys):
    keys = {"trainer__save_freq": 1, "trainer__val_before_train": False, "trainer__total_training_steps": 1}
    assert main(arguments(small, tmp_path, **keys)) == 0
    assert main(arguments(small, tmp_path, **keys)) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(arguments(small, tmp_path, **keys, trainer__resume_mode="disable")) == 0
    assert "set_aside_1" in capsys.readouterr().out
    assert (tmp_path / "set_aside_1" / "global_step_1").is_dir()
    assert (tmp_path / "global_step_1").is_dir()


def test_a_run_goes_on_from_the_checkpoint_that_is_named(small, tmp_path, capsys):
    keys = {"trainer__save_freq": 1, "trainer__val_before_train": False}
    assert main(arguments(small, tmp_path, **keys)) == 0
    before = repeatable(metrics_of(tmp_path))
    named = {"trainer__resume_mode": "resume_path", "trainer__resume_from_path": tmp_path / "global_step_1"}
    assert main(arguments(small, tmp_path, **keys, **named)) == 0
    assert repeatable(metrics_of(tmp_path)) == before


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_stops_cleanly_and_says_how_to_go_on(small, tmp_path, times):
    keys = {"trainer__total_training_steps": 500, "trainer__save_freq": 100, "trainer__max_ckpt_to_keep": 1}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    job = subprocess.Popen(command(arguments(small, tmp_path, **keys)), **pipes, text=True)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert job.poll() is None, job.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    for _ in range(times):
        job.send_signal(signal.SIGINT)
        time.sleep(0.02)
    out, err = job.communicate(timeout=60)
    assert job.returncode == 130
    assert "Traceback" not in out + err
    assert "stopping after this step" in out
    saved = Checkpoints(tmp_path).all()
    if saved:  # with a second Ctrl-C the step may not have come to its end
        assert f"The same command goes on from step {saved[-1].step + 1}." in out
    else:
        assert times == 2
        assert "starts from the beginning" in out
