"""The main job with a reward model, in this process and on ranks of their own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from helpers import arguments, make_model, metrics_of, start
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from verl.trainer.main_ppo import main


@pytest.fixture(scope="module")
def judge(small, tmp_path_factory) -> Path:
    """A sequence classifier with the policy's tokenizer."""
    folder = tmp_path_factory.mktemp("judge")
    make_model(folder / "base", seed=5)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "base", num_labels=1, pad_token_id=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(small / "model").save_pretrained(folder / "model")
    return folder / "model"


def keys_of(judge: Path, run: Path, **more: object) -> dict[str, object]:
    return {
        "reward_model__enable": True,
        "reward_model__model__path": judge,
        "reward_model__model__input_tokenizer": judge,
        "trainer__total_training_steps": 2,
        "trainer__test_freq": 2,
        "trainer__rollout_data_dir": run / "rollouts",
        **more,
    }


def own_scores(judge: Path, folder: Path, step: int) -> tuple[list[float], list[float]]:
    """The scores in a dump, and what transformers says of the same texts, one by one."""
    tokenizer = AutoTokenizer.from_pretrained(judge)
    model = AutoModelForSequenceClassification.from_pretrained(judge, dtype=torch.float32).eval()
    found, expected = [], []
    for row in map(json.loads, (folder / f"{step}.jsonl").read_text().splitlines()):
        ids = tokenizer(row["input"] + row["output"], add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            expected.append(model(torch.tensor([ids])).logits[0, 0].item())
        found.append(row["score"])
    return found, expected


def test_a_reward_model_scores_training_and_validation(small, judge, tmp_path):
    """Nobody else does: the data source has no scorer."""
    keys = keys_of(judge, tmp_path, reward_model__micro_batch_size_per_gpu=3)
    chosen = [text for text in arguments(small, tmp_path, **keys) if not text.startswith("custom_reward_function")]
    assert main(chosen) == 0
    for folder, step in ((tmp_path / "rollouts", 1), (tmp_path / "rollouts", 2), (tmp_path / "validation", 2)):
        found, expected = own_scores(judge, folder, step)
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
        assert len(set(found)) > 1
    last = metrics_of(tmp_path)[-1]
    assert last["reward_model/score/mean"] == last["critic/score/mean"]
    assert last["timing_s/reward_model"] > 0
    assert "val-aux/reward_model_score/mean" in last


def test_its_score_can_be_added_to_the_scorers(small, judge, tmp_path):
    """Here without tokenising again: the policy's token ids as they are."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    same = {"reward_model__model__input_tokenizer": "null", "trainer__total_training_steps": 1}
    assert main(arguments(small, alone, **keys_of(judge, alone, **same))) == 0
    assert main(arguments(small, both, **keys_of(judge, both, **same, reward_model__combine="add"))) == 0
    read = [(folder / "rollouts" / "1.jsonl").read_text().splitlines() for folder in (alone, both)]
    for one, other in zip(*(map(json.loads, lines) for lines in read), strict=True):
        share = one["output"].count("a") / max(len(one["output"]), 1)
        assert one["output"] == other["output"]
        assert other["score"] == pytest.approx(one["score"] + share, abs=1e-6)


@pytest.mark.slow
def test_a_reward_model_on_two_ranks_gives_the_same_scores(small, judge, tmp_path):
    keys = {
        "trainer__n_gpus_per_node": 2,
        "trainer__device": "cpu",
        "trainer__total_training_steps": 1,
        "trainer__val_before_train": False,
        "trainer__test_freq": -1,
        "reward_model__model__fsdp_config__param_offload": True,
    }
    done = start(arguments(small, tmp_path, **keys_of(judge, tmp_path, **keys)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found, expected = own_scores(judge, tmp_path / "rollouts", 1)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_reward_model_must_be_named(small, tmp_path, capsys):
    assert main(arguments(small, tmp_path, reward_model__enable=True)) == 2
    assert "reward_model.model.path" in capsys.readouterr().err
