"""main_ppo up to where torch would be needed: the printed plan, exit codes, and what is not imported."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import fake_nvml
import pytest

from verl.trainer.main_ppo import main

PROJECT = Path(__file__).resolve().parents[2]
RUN = [
    "actor_rollout_ref.rollout.name=hf",
    "data.train_batch_size=64",
    "actor_rollout_ref.actor.ppo_mini_batch_size=32",
    "data.max_prompt_length=256",
    "data.max_response_length=256",
    "trainer.device=cpu",
]


@pytest.fixture
def arguments(gsm8k, model, tmp_path) -> list[str]:
    return [
        *RUN,
        f"data.train_files={gsm8k}/train.parquet",
        f"data.val_files={gsm8k}/test.parquet",
        f"actor_rollout_ref.model.path={model}",
        f"trainer.default_local_dir={tmp_path}/run",
    ]


def test_a_sound_dry_run_prints_the_plan_and_writes_nothing(arguments, capsys, tmp_path):
    assert main([*arguments, "trainer.dry_run=True"]) == 0
    out = capsys.readouterr().out
    assert "one CPU, everything in this process" in out
    assert "No problem found." in out
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_names_the_advantages_and_the_loss(arguments, capsys):
    loss = "actor_rollout_ref.actor.policy_loss.loss_mode=gspo"
    assert main([*arguments, "algorithm.adv_estimator=remax", loss, "trainer.dry_run=True"]) == 0
    out = capsys.readouterr().out
    assert "remax, with a greedy response to each prompt on top" in out
    assert "gspo, seq-mean-token-mean" in out
    assert "builds critic" not in out


def test_a_dry_run_says_how_the_reward_model_is_run(arguments, model, capsys):
    keys = ["reward_model.enable=True", f"reward_model.model.path={model}", "reward_model.micro_batch_size_per_gpu=8"]
    main([*arguments, *keys, "trainer.dry_run=True"])
    assert re.search(r"reward model +per rank .* 8 ", capsys.readouterr().out)


def test_a_dry_run_says_that_prompts_are_drawn_until_enough_differ(arguments, capsys):
    keys = ["algorithm.filter_groups.enable=True", "algorithm.filter_groups.metric=acc"]
    assert main([*arguments, *keys, "actor_rollout_ref.rollout.n=4", "trainer.dry_run=True"]) == 0
    out = capsys.readouterr().out
    assert "64, sampled until so many have responses that differ in acc" in out
    assert "116 at most" in out


def test_a_dry_run_needs_neither_torch_nor_transformers_nor_the_network(arguments):
    program = (
        "import socket, sys\n"
        "def refuse(*args): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        "from verl.trainer.main_ppo import main\n"
        f"code = main({[*arguments, 'trainer.dry_run=True', 'critic.model.path=some/hub-model']!r})\n"
        "heavy = {'torch', 'transformers', 'tensorboard', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'exit code {code}, imported: {heavy}' if code or heavy else 0)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "critic.model.path=some/hub-model: not in the local hub cache" in done.stdout


def test_the_plan_is_printed_even_when_the_data_are_missing(arguments, capsys):
    assert main([*arguments, "data.train_files=/no/train.parquet", "trainer.dry_run=True"]) == 1
    out = capsys.readouterr().out
    assert "unknown until the data can be read (30 epochs)" in out
    assert "2 mini-batches of 32 prompts" in out
    assert "1 problem; nothing was started." in out
    assert "data.train_files=" in out


def test_a_dry_run_of_settings_that_cannot_be_read_prints_every_problem(arguments, capsys):
    assert main([*arguments, "trainer.dry_run=True", "data.shufle=True", "actor_rollout_ref.model.path=/no/model"]) == 1
    out = capsys.readouterr().out
    assert "2 problems; nothing was started." in out
    assert "data.shuffle" in out
    assert "Plan of the run" not in out


def test_a_real_run_with_problems_ends_before_it_starts(arguments, capsys):
    assert main([*arguments, "actor_rollout_ref.rollout.name=vllm", "data.val_files=/no/test.parquet"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("2 problems; nothing was started.")
    assert "set it to hf" in captured.err


def test_many_validation_steps_are_shortened(arguments, capsys):
    assert main([*arguments, "trainer.dry_run=True", "trainer.test_freq=100", "trainer.save_freq=1000"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "validation before training and at steps 100, 200, 300, ..., 3480 (1,319 prompts)" in out
    assert "checkpoints at steps 1000, 2000, 3000, 3480" in out


def test_a_gpu_that_torch_cannot_use_is_pointed_out(arguments, capsys, monkeypatch):
    from verl.machine import torch_is_cpu_build

    if not torch_is_cpu_build():
        pytest.skip("needs a CPU build of torch")
    fake_nvml.install(monkeypatch, [("GPU-1", 80994, 81559), ("GPU-2", 80994, 81559)])
    assert main([*arguments, "trainer.dry_run=True", "trainer.device=auto"]) == 0
    assert "Install a CUDA build of torch" in capsys.readouterr().out
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([*arguments, "trainer.dry_run=True", "trainer.device=auto"]) == 0
    assert "Install a CUDA build of torch" not in capsys.readouterr().out
