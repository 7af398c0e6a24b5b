"""The guide's two commands, pasted into a shell as they are."""

import os
import subprocess

import pytest
from guide import ONE_MACHINE, TWO_MACHINES

from verl.config import load, report


def typed_in_a_shell(command: str, folder) -> list[str]:
    """What python3 would be called with, module name left off, after the shell's own expansions."""
    script = 'python3() { printf "%s\\n" "${@:3}"; }\n' + command
    environment = {**os.environ, "HOME": "/home/user", "DATA_DIR": "/data"}
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


@pytest.fixture(params=[ONE_MACHINE, TWO_MACHINES], ids=["one machine", "two machines"])
def guide(request, tmp_path):
    arguments = typed_in_a_shell(request.param, tmp_path)
    loaded = load(arguments)
    assert not loaded.problems, report(loaded.problems)
    return arguments, loaded


def test_the_guides_commands_are_read_without_a_problem(guide):
    _, loaded = guide
    assert loaded.config.data.train_batch_size == 4096
    assert loaded.config.trainer.logger == ["console"]
    assert loaded.config.trainer.default_hdfs_dir is None
    assert loaded.config.algorithm.use_kl_in_reward is True
    assert loaded.config.actor_rollout_ref.actor.optim.lr == 1e-6


def test_each_key_of_the_commands_counts_as_set(guide):
    arguments, loaded = guide
    assert len(loaded.set_keys) == len(arguments)


def test_global_batch_sizes_of_the_second_command_are_one_a_rank(tmp_path):
    loaded = load(typed_in_a_shell(TWO_MACHINES, tmp_path))
    assert loaded.config.actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu == 1
    assert loaded.config.critic.ppo_micro_batch_size_per_gpu == 1
    assert loaded.config.actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu == 16
    assert len(loaded.notices) == 3  # two old batch sizes and the KL penalty


def test_the_supervised_trainer_has_its_own_keys(load_valid):
    from verl.config import SFTConfig

    loaded = load_valid("data.train_batch_size=8", "optim.lr=1e-3", required=("model.path=m",), schema=SFTConfig)
    assert loaded.config.model.tokenizer_path == "m"
    assert loaded.config.optim.lr == 1e-3
    assert loaded.config.trainer.default_local_dir == "checkpoints/verl/sft"
