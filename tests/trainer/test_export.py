"""Checkpoints of runs as Hugging Face folders, through ``verl export``; tests/engine has what ranks save."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers import arguments
from safetensors.torch import load_file

from verl.__main__ import COMMANDS, main
from verl.trainer.main_ppo import main as train


def same_files(one: Path, other: Path) -> bool:
    names = {path.name for path in one.iterdir()}
    return names == {path.name for path in other.iterdir()} and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names
    )


@pytest.fixture(scope="module")
def run(small, tmp_path_factory) -> Path:
    """Of two steps, in bfloat16, with a checkpoint at each and the run's own exports in it."""
    folder = tmp_path_factory.mktemp("export") / "run"
    keys = {
        "trainer__total_training_steps": 2,
        "trainer__save_freq": 1,
        "trainer__val_before_train": False,
        "trainer__check_log_probs": False,
        "actor_rollout_ref__actor__fsdp_config__dtype": "bfloat16",
        "actor_rollout_ref__actor__checkpoint__save_contents": "[model,optimizer,extra,hf_model]",
        "critic__checkpoint__save_contents": "[model,optimizer,extra,hf_model]",
    }
    assert train(arguments(small, folder, **keys)) == 0
    return folder


@pytest.mark.parametrize(
    ("named", "more", "own"),
    [
        (".", [], "global_step_2/actor"),
        ("global_step_1", [], "global_step_1/actor"),
        ("global_step_1/critic", [], "global_step_1/critic"),
        ("global_step_2", ["--role", "critic"], "global_step_2/critic"),
    ],
)
def test_a_checkpoint_becomes_the_files_that_the_run_itself_exported(run, tmp_path, named, more, own):
    assert main(["export", str(run / named), str(tmp_path / "out"), *more]) == 0
    assert same_files(tmp_path / "out", run / own / "huggingface")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


def test_the_type_can_be_chosen_and_float32_is_the_masters(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--dtype", "float32"]) == 0
    assert "(float32)" in capsys.readouterr().out
    found = load_file(tmp_path / "out" / "model.safetensors")
    own = load_file(run / "global_step_2" / "actor" / "huggingface" / "model.safetensors")
    assert found.keys() == own.keys()
    assert any(not torch.equal(found[name], own[name].float()) for name in own)
    assert all(torch.equal(found[name].to(torch.bfloat16), own[name]) for name in own)

    from transformers import AutoModelForCausalLM

    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_a_checkpoint_that_was_set_aside_is_exported_too(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "set_aside_1").mkdir()
    (tmp_path / "run" / "global_step_2").rename(tmp_path / "run" / "set_aside_1" / "global_step_2")
    assert main(["export", str(tmp_path / "run" / "set_aside_1" / "global_step_2"), str(tmp_path / "out")]) == 0
    assert same_files(tmp_path / "out", run / "global_step_2" / "actor" / "huggingface")


def test_a_model_that_was_moved_can_be_named(run, small, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(small / "model"), str(tmp_path / "gone")))
    asked = ["export", str(tmp_path / "run"), str(tmp_path / "out")]
    assert main(asked) == 1
    assert f"{tmp_path / 'gone'}" in capsys.readouterr().err
    assert main([*asked, "--model", str(small / "model")]) == 0
    assert same_files(tmp_path / "out", run / "global_step_2" / "actor" / "huggingface")


def test_what_cannot_be_exported_is_named_and_nothing_is_written(run, small, tmp_path, capsys):
    damaged = tmp_path / "damaged"
    shutil.copytree(run, damaged)
    next((damaged / "global_step_2" / "actor").glob("*.safetensors")).write_bytes(b"no")
    (tmp_path / "there").mkdir()
    cases = {
        (str(damaged / "global_step_2"), str(tmp_path / "out")): "is damaged",
        (str(run), str(tmp_path / "there")): "is there already",
        (str(small), str(tmp_path / "out")): "neither a run's folder",
        (str(run / "global_step_2" / "reference"), str(tmp_path / "out")): "has no reference (it has: actor, critic)",
    }
    for arguments_, complaint in cases.items():
        assert main(["export", *arguments_]) == 1
        said = capsys.readouterr().err
        assert complaint in said
        assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_commands_are_listed_and_passed_on(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)
    assert main(["exprot"]) == 2
    assert "there is no command 'exprot'" in capsys.readouterr().err
    for command in ("ppo", "sft", "generate", "eval"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"python3 -m {COMMANDS[command][0]}" in capsys.readouterr().out
