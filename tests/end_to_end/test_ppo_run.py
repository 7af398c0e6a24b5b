import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from forks import run_forked
from helpers import arguments, metrics_of, repeatable

from verl.config.sections.parts import ModelConfig
from verl.engine.model import model_size
from verl.machine import HostMemory
from verl.rollout.embedded.sampling import sample_tokens
from verl.tracking.dumps import read_rows
from verl.trainer.main_ppo import main


def test_the_job_learns_its_reward_and_leaves_a_whole_run_folder(small, tmp_path):
    run = tmp_path / "run"
    keys = {
        "trainer__total_training_steps": 15,
        "trainer__save_freq": 15,
        "trainer__test_freq": 15,
        "trainer__logger": "[console,file,tensorboard]",
        "actor_rollout_ref__actor__optim__lr": 5e-3,
        "actor_rollout_ref__actor__checkpoint__save_contents": "[model,optimizer,extra,hf_model]",
    }
    assert main(arguments(small, run, **keys)) == 0
    scores = [step["critic/score/mean"] for step in metrics_of(run) if step["step"] > 0]
    assert np.mean(scores[-3:]) > 3 * np.mean(scores[:3])
    for name in ("config.yaml", "curve.png", "samples.md", "README.md", "validation/0.jsonl", "validation/15.jsonl"):
        assert (run / name).is_file(), name
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["train_batch_size"] == 8
    assert list((run / "tensorboard").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = run / "global_step_15" / "actor" / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = AutoTokenizer.from_pretrained(exported)
    answer = model.generate(**tokenizer("bc", return_tensors="pt"), max_new_tokens=8, do_sample=False)[0, 2:]
    assert "a" in tokenizer.decode(answer)


@pytest.mark.parametrize("available", [0.5, 1.1], ids=["too little", "hardly enough"])
def test_a_machine_without_the_memory_is_refused_before_anything_is_built(
    small, tmp_path, capsys, monkeypatch, available
):
    memory = HostMemory(available=int(available * memory_of(small)), total=10**12)
    monkeypatch.setattr("verl.trainer.ppo.run.host_memory", lambda: memory)
    exit_code = main(arguments(small, tmp_path / "run", trainer__total_training_steps=1))
    told = capsys.readouterr()
    if available < 1:
        assert exit_code == 1
        assert "error: host memory: the run takes up to" in told.err
        assert "critic.model.fsdp_config" in told.err
        assert not (tmp_path / "run").exists()
    else:
        assert exit_code == 0
        assert "warning: host memory: the run takes up to" in told.out


def memory_of(small) -> int:
    """Bytes that actor and critic take on a CPU: 12 a parameter, and 4 for gradients of one of them."""
    actor, critic = (
        model_size(ModelConfig(path=str(small / "model")), kind).parameters for kind in ("policy", "value")
    )
    return 12 * (actor + critic) + 4 * actor


def test_engine_and_trainer_agree_on_every_tokens_log_prob(small, tmp_path):
    assert main(arguments(small, tmp_path, trainer__val_before_train=False)) == 0
    for step in metrics_of(tmp_path):
        assert step["training/rollout_log_probs_diff_max"] < 1e-4


def test_comparing_log_probs_before_the_first_step_changes_nothing(small, tmp_path, capsys):
    for name, check in (("checked", True), ("unchecked", False)):
        assert main(arguments(small, tmp_path / name, trainer__check_log_probs=check)) == 0
        assert ("engine and trainer agree" in capsys.readouterr().out) == check
    assert repeatable(metrics_of(tmp_path / "checked")) == repeatable(metrics_of(tmp_path / "unchecked"))


@pytest.mark.parametrize(
    ("sampled", "said", "message"),
    [
        (1.0, 1.0, "engine's log-probs are of temperature 1,"),
        (0.05, None, "draws from another distribution than it reports"),
    ],
    ids=["the engine ignores the temperature", "the engine reports another one than it draws at"],
)
def test_an_engine_at_another_temperature_stops_the_run(small, tmp_path, capsys, monkeypatch, sampled, said, message):
    def draw_wrong(logits, rows, positions, banned=()):
        wrong = replace(rows, temperature=np.full_like(rows.temperature, sampled))
        tokens, log_probs = sample_tokens(logits, wrong, positions, banned)
        if said is None:  # what it should have been drawn at
            scaled = (logits / torch.from_numpy(rows.temperature)[:, None]).log_softmax(-1)
            log_probs = scaled.gather(-1, tokens[:, None])[:, 0]
        return tokens, log_probs

    monkeypatch.setattr("verl.rollout.embedded.decoder.sample_tokens", draw_wrong)
    keys = {"actor_rollout_ref__rollout__temperature": 0.6, "trainer__val_before_train": False}
    assert main(arguments(small, tmp_path, **keys)) == 1
    said_to_user = capsys.readouterr().err
    assert message in said_to_user
    assert "actor_rollout_ref.rollout.temperature=0.6" in said_to_user
    assert main(arguments(small, tmp_path, **keys, trainer__check_log_probs=False)) == 0


@pytest.mark.parametrize(
    "keys",
    [
        {"algorithm__adv_estimator": "grpo", "actor_rollout_ref__actor__use_kl_loss": True},
        {"algorithm__kl_ctrl__kl_coef": 0.01, "algorithm__kl_ctrl__type": "adaptive"},
        {"trainer__critic_warmup": 3, "actor_rollout_ref__actor__ppo_epochs": 2},
        {"actor_rollout_ref__actor__policy_loss__loss_mode": "gspo", "algorithm__adv_estimator": "rloo"},
        {"algorithm__rollout_correction__level": "token"},
        {"algorithm__rollout_correction__level": "sequence", "algorithm__rollout_correction__mode": "mask"},
    ],
    ids=[
        "grpo with KL loss",
        "KL in the reward",
        "critic warm-up, two epochs",
        "GSPO with RLOO",
        "clamped weights",
        "masked weights",
    ],
)
def test_variants_of_the_loop_run(small, tmp_path, keys):
    assert main(arguments(small, tmp_path, **keys)) == 0
    last = metrics_of(tmp_path)[-1]
    assert np.isfinite(last["actor/grad_norm"])
    if keys.get("algorithm__adv_estimator") == "grpo":
        assert "critic/vf_loss" not in last
        assert last["actor/kl_loss"] >= 0
    if "algorithm__kl_ctrl__kl_coef" in keys:
        assert last["actor/reward_kl_penalty_coeff"] != 0.01
    if "algorithm__rollout_correction__level" in keys:
        assert last["training/rollout_is_mean"] == pytest.approx(1.0, abs=1e-4)
        assert last["training/rollout_is_cut"] == 0.0
    if "trainer__critic_warmup" in keys:
        assert ["actor/pg_loss" in step for step in metrics_of(tmp_path)] == [False, False, False, True]


def test_remax_generates_and_scores_a_greedy_response_to_each_prompt(small, tmp_path):
    """Validation of the same prompts, before training, is greedy as well: the same scores."""
    keys = {
        "algorithm__adv_estimator": "remax",
        "data__shuffle": False,
        "data__val_files": small / "train.parquet",
        "data__val_max_samples": 8,
        "trainer__rollout_data_dir": tmp_path / "rollout",
        "trainer__total_training_steps": 1,
    }
    assert main(arguments(small, tmp_path, **keys)) == 0
    before, step = metrics_of(tmp_path)
    assert "critic/vf_loss" not in step
    assert step["critic/greedy_reward/mean"] == pytest.approx(before["val-core/tests/letters/reward/mean@1"])
    sampled = [json.loads(line) for line in (tmp_path / "rollout" / "1.jsonl").read_text().splitlines()]
    assert len(sampled) == 16  # the greedy ones are not trained on
    assert step["critic/advantages/mean"] != 0


@pytest.mark.parametrize(
    "keys",
    [
        {"actor_rollout_ref__actor__ppo_micro_batch_size_per_gpu": 1},
        {"actor_rollout_ref__actor__use_dynamic_bsz": True, "actor_rollout_ref__actor__ppo_max_token_len_per_gpu": 40},
        {"actor_rollout_ref__model__enable_gradient_checkpointing": False},
    ],
    ids=["micro-batches of one", "token budget", "no gradient checkpointing"],
)
@pytest.mark.parametrize("loss", ["vanilla", "kl_cov"])
def test_how_the_step_is_cut_does_not_change_what_is_learned(small, tmp_path, keys, loss):
    common = {
        "trainer__val_before_train": False,
        "trainer__total_training_steps": 2,
        "actor_rollout_ref__actor__policy_loss__loss_mode": loss,
    }
    assert main(arguments(small, tmp_path / "whole", **common)) == 0
    assert main(arguments(small, tmp_path / "cut", **common, **keys)) == 0
    for one, other in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "cut"), strict=True):
        for name in ("critic/score/mean", "actor/grad_norm", "critic/grad_norm", "actor/pg_loss", "critic/vf_loss"):
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_a_run_repeats_bit_for_bit(small, tmp_path):
    for name in ("one", "two"):
        assert run_forked(main, arguments(small, tmp_path / name)).returncode == 0
    assert repeatable(metrics_of(tmp_path / "one")) == repeatable(metrics_of(tmp_path / "two"))


def test_responses_of_training_and_validation_are_kept_as_jsonl_and_parquet(small, tmp_path):
    keys = {"trainer__rollout_data_dir": tmp_path / "rollouts", "trainer__generations_format": "[jsonl,parquet]"}
    assert main(arguments(small, tmp_path, **keys, trainer__test_freq=3)) == 0
    for folder, steps, count in (("rollouts", (1, 2, 3), 16), ("validation", (0, 3), 6)):
        for step in steps:
            rows = read_rows(tmp_path / folder / f"{step}.jsonl")
            assert read_rows(tmp_path / folder / f"{step}.parquet") == rows
            assert len(rows) == count
            assert all(row["score"] == row["output"].count("a") / max(len(row["output"]), 1) for row in rows)
