"""The main job with ranks that are processes of their own, on this machine: the same numbers, and clean ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from forks import run_forked
from helpers import ROOT, arguments, command, metrics_of, start, wait_for_steps
from safetensors.torch import load_file

from verl.machine import HostMemory
from verl.trainer.main_ppo import main

# What a step's tokens decide, whoever computes it.
SAME = (
    "actor/pg_loss",
    "actor/grad_norm",
    "actor/entropy",
    "critic/vf_loss",
    "critic/grad_norm",
    "critic/score/mean",
    "response_length/mean",
    "training/rollout_log_probs_diff_mean",
)
# They try for 60 seconds to tell Ray's head, which is gone, that their node is.
RAY_AGENTS = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
EVERYTHING = {
    "trainer__device": "cpu",
    "trainer__save_freq": 3,
    "actor_rollout_ref__actor__use_kl_loss": True,  # builds the reference
    "actor_rollout_ref__actor__checkpoint__save_contents": "[model,optimizer,extra,hf_model]",
    "actor_rollout_ref__actor__fsdp_config__param_offload": True,
    "critic__model__fsdp_config__optimizer_offload": True,
}


def assert_same(run: Path, other: Path) -> None:
    for step, found in zip(metrics_of(run), metrics_of(other), strict=True):
        for name in SAME if step["step"] else ("val-core/tests/letters/reward/mean@1",):
            assert found[name] == pytest.approx(step[name], rel=1e-5, abs=1e-6), (name, step["step"])


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    (file,) = (run / "global_step_3" / "actor" / "huggingface").glob("*.safetensors")
    return load_file(file)


def run_job(small: Path, run: Path, **keys: object) -> str:
    done = run_forked(main, arguments(small, run, **keys))
    logs = "".join(log.read_text()[-1500:] for log in run.glob("ranks/*.log"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:] + logs
    return done.stdout


@pytest.fixture(scope="module")
def alone(small, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("alone")
    run_job(small, run, **EVERYTHING)
    return run


@pytest.mark.parametrize(
    ("ranks", "keys"),
    [
        (1, {"trainer__executor": "ray"}),
        (2, {}),
        (4, {"actor_rollout_ref__actor__fsdp_config__fsdp_size": 2, "trainer__balance_batch": False}),
    ],
)
def test_any_number_of_ranks_draws_and_trains_as_one_process_does(small, alone, tmp_path, ranks, keys):
    output = run_job(small, tmp_path, trainer__n_gpus_per_node=ranks, **EVERYTHING, **keys)
    assert f"starting {ranks} ranks on" in output
    assert_same(alone, tmp_path)
    expected, found = weights_of(alone), weights_of(tmp_path)
    assert set(found) == set(expected)
    assert all(torch.allclose(found[name], expected[name], atol=2e-5) for name in expected)


def test_a_node_without_the_memory_is_refused_before_ranks_start(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("verl.trainer.ppo.on_ray.host_memory", lambda: HostMemory(available=10**6, total=10**9))
    assert main(arguments(small, tmp_path / "run", trainer__n_gpus_per_node=2, trainer__device="cpu")) == 1
    told = capsys.readouterr()
    assert f"host memory: the run takes up to 2 MB on {socket.gethostname()}, while" in told.err
    assert "starting 2 ranks" not in told.out
    assert not (tmp_path / "run").exists()


def test_a_run_of_two_ranks_goes_on_with_one_process(small, alone, tmp_path):
    run_job(
        small,
        tmp_path,
        trainer__n_gpus_per_node=2,
        **EVERYTHING | {"trainer__save_freq": 1},
        trainer__max_ckpt_to_keep=2,
    )
    kept = sorted(tmp_path.glob("global_step_*"))
    assert [folder.name for folder in kept] == ["global_step_2", "global_step_3"]
    for folder in kept[1:]:
        subprocess.run(["rm", "-r", str(folder)], check=True)
    assert "going on from" in run_job(small, tmp_path, **EVERYTHING)
    assert_same(alone, tmp_path)


@pytest.mark.parametrize("victim", ["rank", "driver"])
def test_the_death_of_a_rank_or_of_the_driver_is_the_end_of_all(small, tmp_path, victim):
    keys = {"trainer__total_training_steps": 10000, "trainer__val_before_train": False, "trainer__device": "cpu"}
    run = subprocess.Popen(
        command(arguments(small, tmp_path, trainer__n_gpus_per_node=2, **keys)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    started: list[psutil.Process] = []
    try:
        wait_for_steps(run, tmp_path, 2, run.communicate)
        started = psutil.Process(run.pid).children(recursive=True)  # Ray, all that it started, and who scores
        ranks = [process for process in started if process.name().startswith("ray::Rank")]
        assert len(ranks) == 2
        killed = psutil.Process(run.pid) if victim == "driver" else min(ranks, key=lambda process: process.pid)
        begun = time.monotonic()
        os.kill(killed.pid, signal.SIGKILL)
        _, stderr = run.communicate(timeout=60)
    finally:
        run.kill()
    if victim == "rank":
        assert run.returncode == 1
        assert time.monotonic() - begun < 40
        told = re.search(r"error: rank (\d) \(node .*, 127\.0\.0\.1, pid (\d+)\) is gone", stderr)
        assert told, stderr[-3000:]
        assert int(told[2]) == killed.pid
        assert f"Its output is in {tmp_path}/ranks/rank-{told[1]}.log" in stderr
        assert "Traceback" not in stderr
    deadline = time.monotonic() + 20
    while not (left := names_of_running(started)) <= RAY_AGENTS and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left <= RAY_AGENTS


def names_of_running(processes: list[psutil.Process]) -> set[str]:
    names = set()
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                names.add(process.name())
    return names


def test_more_devices_than_there_are_is_told_before_anything_starts(small, tmp_path):
    done = start(arguments(small, tmp_path, trainer__nnodes=2, trainer__device="cpu"))
    assert done.returncode == 1
    assert "trainer.nnodes=2 and trainer.n_gpus_per_node=1 ask for 1 CPU rank on each of 2 machines" in done.stderr
    assert "CPUs free/all" in done.stderr
    assert not list(tmp_path.glob("ranks/*"))
