"""DAPO's keys together: decoupled clip, dynamic sampling, overlong penalty, token-mean loss."""

import json
from pathlib import Path

import numpy as np
import pytest
from helpers import arguments, metrics_of, repeatable, start
from test_resume import tensors_of

from verl.trainer.main_ppo import main

DAPO = {
    "algorithm__adv_estimator": "grpo",
    "algorithm__filter_groups__enable": True,
    "algorithm__filter_groups__metric": "odd",
    "actor_rollout_ref__actor__clip_ratio_low": 0.2,
    "actor_rollout_ref__actor__clip_ratio_high": 0.28,
    "actor_rollout_ref__actor__loss_agg_mode": "token-mean",
    "reward_model__overlong_buffer__enable": True,
    "reward_model__overlong_buffer__len": 6,
    "reward_model__overlong_buffer__penalty_factor": 0.5,
    "trainer__val_before_train": False,
    "trainer__save_freq": 1,
}


@pytest.fixture(scope="module")
def dapo(small, tmp_path_factory):
    """The keys, with a reward that is the toss of a coin: 0 or 1, as the sum of the characters is even or odd."""
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(
        "def compute_score(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    odd = sum(map(ord, solution_str)) % 2\n"
        "    return {'score': float(odd), 'odd': odd}\n"
    )
    return {**DAPO, "custom_reward_function__path": reward}


def drawn(run: Path, step: int) -> list[dict]:
    return [json.loads(line) for line in (run / "rollout" / f"{step}.jsonl").read_text().splitlines()]


def test_steps_hold_only_groups_that_differ_and_long_responses_lose_reward(small, tmp_path, dapo):
    assert main(arguments(small, tmp_path, **dapo, trainer__rollout_data_dir=tmp_path / "rollout")) == 0
    steps = metrics_of(tmp_path)
    for step, metrics in enumerate(steps, start=1):
        rows = drawn(tmp_path, step)
        assert len(rows) == 16
        assert all({one["score"], two["score"]} == {0.0, 1.0} for one, two in zip(rows[::2], rows[1::2], strict=True))
        assert len({row["uid"] for row in rows}) == 16
        penalty = np.mean([-0.5 * max(0, row["response_tokens"] - 6) / 6 for row in rows])
        assert metrics["reward/overlong_penalty"] == pytest.approx(penalty)
        assert metrics["critic/score/mean"] == 0.5
        assert metrics["critic/rewards/mean"] == pytest.approx(0.5 + penalty)
        counts = {name: metrics[f"training/groups_{name}"] for name in ("drawn", "equal", "given_back")}
        assert counts["drawn"] == 8 + counts["equal"] + counts["given_back"]
        assert np.isfinite(metrics["actor/grad_norm"])
    assert sum(metrics["training/groups_equal"] for metrics in steps) > 0


def test_a_run_that_stopped_goes_on_with_the_same_bits(small, tmp_path, dapo):
    for name, stops in (("whole", [5]), ("stopped", [2, 3, 5])):
        for steps in stops:
            keys = {**dapo, "trainer__total_training_steps": steps}
            done = start(arguments(small, tmp_path / name, **keys))
            assert done.returncode == 0, done.stderr
    assert repeatable(metrics_of(tmp_path / "stopped")) == repeatable(metrics_of(tmp_path / "whole"))
    ours, theirs = tensors_of(tmp_path / "stopped"), tensors_of(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_past_the_limit_of_generations_the_run_says_so(small, tmp_path, dapo, capsys):
    keys = {"algorithm__filter_groups__max_num_gen_batches": 1}
    assert main(arguments(small, tmp_path, **dapo, **keys)) != 0
    assert "algorithm.filter_groups.max_num_gen_batches=1" in capsys.readouterr().err
