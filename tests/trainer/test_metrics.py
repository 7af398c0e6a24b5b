"""A step's metrics, each against plain Python over the rows."""

import json
import math
import statistics

import numpy as np
import pyarrow as pa
import pytest
import torch

from verl.data.schema import COLUMNS
from verl.trainer.ppo.metrics import (
    StageCost,
    data_metrics,
    explained_variance,
    length_metrics,
    memory_metrics,
    rollout_mismatch_metrics,
    seqlen_metrics,
    sequence_lengths,
    stage_metrics,
    timing_metrics,
)

ROWS = {
    "prompt_ids": [[1, 2, 3], [1, 2], [1, 2, 3, 4]],
    "response_ids": [[5, 6], [7, 8, 9, 10], [11]],
    "response_mask": [[1, 1], [1, 0, 0, 1], [1]],
    "finish_reason": ["stop", "length", "abort"],
    "score": [1.0, 0.0, 0.5],
    "token_rewards": [[-0.1, 0.9], [0, 0, 0, -0.2], [0.5]],
    "advantages": [[1.0, 2.0], [3.0, 99.0, 99.0, -4.0], [0.5]],
    "returns": [[0.5, 1.5], [2.5, 99.0, 99.0, -1.0], [0.25]],
    "values": [[0.25, 1.0], [2.0, math.nan, math.nan, -0.5], [0.5]],
    "entropy": [[1.0, 2.0], [3.0, math.nan, math.nan, 4.0], [5.0]],
    "rollout_log_probs": [[-1.0, -2.0], [-0.5, math.nan, math.nan, -3.0], [-0.1]],
    "old_log_probs": [[-1.5, -2.0], [-0.25, 0.0, 0.0, -3.0], [-0.125]],
}


def table(**replaced) -> pa.Table:
    columns = {**ROWS, **replaced}
    return pa.table({name: pa.array(column, COLUMNS[name]) for name, column in columns.items()})


def written(name):
    """The column's entries at tokens with mask 1, as a list."""
    pairs = zip(ROWS[name], ROWS["response_mask"], strict=True)
    return [x for row, mask in pairs for x, m in zip(row, mask, strict=True) if m]


def assert_spread(metrics, name, values):
    found = [metrics[f"{name}/{statistic}"] for statistic in ("mean", "max", "min")]
    assert found == pytest.approx([statistics.fmean(values), max(values), min(values)], rel=1e-6)


def test_scores_and_rewards_are_per_sequence():
    metrics = data_metrics(table(), max_prompt_length=4)
    assert_spread(metrics, "critic/score", ROWS["score"])
    assert_spread(metrics, "critic/rewards", [sum(row) for row in ROWS["token_rewards"]])


@pytest.mark.parametrize("name", ["advantages", "returns", "values"])
def test_token_statistics_count_only_what_the_policy_wrote(name):
    assert_spread(data_metrics(table(), max_prompt_length=4), f"critic/{name}", written(name))


def test_entropy_is_the_mean_over_what_the_policy_wrote():
    assert data_metrics(table(), max_prompt_length=4)["actor/entropy"] == pytest.approx(3.0)


def test_lengths_and_how_often_they_hit_the_limit():
    metrics = data_metrics(table(), max_prompt_length=4)
    assert_spread(metrics, "prompt_length", [3, 2, 4])
    assert_spread(metrics, "response_length", [2, 4, 1])
    assert metrics["prompt_length/clip_ratio"] == pytest.approx(1 / 3)

    metrics = length_metrics(table(finish_reason=["length", "abort", "length"]), max_prompt_length=4)
    assert metrics["response_length/clip_ratio"] == pytest.approx(2 / 3)
    assert metrics["response/aborted_ratio"] == pytest.approx(1 / 3)


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns = np.array([1.0, -2.0, 5.0])
    assert explained_variance(returns + 3, returns) == pytest.approx(1.0)
    assert explained_variance(np.full(3, 7.0), returns) == pytest.approx(0.0)
    assert math.isnan(explained_variance(np.array([1.0, 2.0]), np.array([3.0, 3.0])))

    values, returns = written("values"), written("returns")
    unexplained = statistics.pvariance([r - v for r, v in zip(returns, values, strict=True)])
    expected = 1 - unexplained / statistics.pvariance(returns)
    assert data_metrics(table(), max_prompt_length=4)["critic/vf_explained_var"] == pytest.approx(expected, rel=1e-6)


def test_a_run_without_a_critic_has_no_value_metrics():
    metrics = data_metrics(table().drop_columns(["values"]), max_prompt_length=4)
    assert not [name for name in metrics if "value" in name or "vf_" in name]
    assert "critic/returns/mean" in metrics


def test_the_mismatch_between_rollout_and_training_is_measured_on_probabilities_and_log_probs():
    metrics = rollout_mismatch_metrics(table())
    pairs = list(zip(written("rollout_log_probs"), written("old_log_probs"), strict=True))
    probs = [abs(math.exp(a) - math.exp(b)) for a, b in pairs]
    logs = [abs(a - b) for a, b in pairs]
    ratios = [math.exp(b - a) for a, b in pairs]
    assert metrics == pytest.approx(
        {
            "training/rollout_probs_diff_max": max(probs),
            "training/rollout_probs_diff_mean": statistics.fmean(probs),
            "training/rollout_probs_diff_std": statistics.pstdev(probs),
            "training/rollout_log_probs_diff_max": max(logs),
            "training/rollout_log_probs_diff_mean": statistics.fmean(logs),
            "training/rollout_log_probs_diff_over_0.1": 2 / 5,
            "training/rollout_importance_ratio_mean": statistics.fmean(ratios),
            "training/rollout_importance_ratio_max": max(ratios),
            "training/rollout_importance_ratio_min": min(ratios),
            "training/rollout_kl_k1": statistics.fmean(a - b for a, b in pairs),
            "training/rollout_kl_k3": statistics.fmean(r - 1 - math.log(r) for r in ratios),
        },
        rel=1e-5,
    )


def test_the_mismatch_of_policies_that_are_worlds_apart_is_measured_without_overflow():
    far = table(rollout_log_probs=[[-1.0, -2.0], [-0.5, 0.0, 0.0, -900.0], [-0.1]])
    metrics = rollout_mismatch_metrics(far)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["training/rollout_importance_ratio_max"] == pytest.approx(math.exp(20))


def test_both_kl_estimates_are_of_the_kl_from_engine_to_trainer():
    rng = np.random.default_rng(0)
    engine, trainer = (np.log(rng.dirichlet(np.full(6, 5.0))) for _ in range(2))
    drawn = rng.choice(6, size=200_000, p=np.exp(engine))
    column = {"response_ids": [drawn.tolist()], "response_mask": [[1] * len(drawn)]}
    metrics = rollout_mismatch_metrics(
        pa.table(
            {name: pa.array(c, COLUMNS[name]) for name, c in column.items()}
            | {
                "rollout_log_probs": pa.array([engine[drawn]], COLUMNS["rollout_log_probs"]),
                "old_log_probs": pa.array([trainer[drawn]], COLUMNS["old_log_probs"]),
            }
        )
    )
    kl = np.exp(engine) @ (engine - trainer)
    assert metrics["training/rollout_kl_k1"] == pytest.approx(kl, rel=0.05)
    assert metrics["training/rollout_kl_k3"] == pytest.approx(kl, rel=0.05)


def test_sequence_lengths_over_ranks_before_and_after_balancing():
    lengths = sequence_lengths(table())
    assert lengths.tolist() == [5, 6, 5]
    metrics = seqlen_metrics(np.array([10, 2, 9, 5]), [np.array([0, 3]), np.array([1, 2])])
    assert metrics == {
        "global_seqlen/min": 12,
        "global_seqlen/max": 14,
        "global_seqlen/minmax_diff": 2,
        "global_seqlen/balanced_min": 11,
        "global_seqlen/balanced_max": 15,
        "global_seqlen/mean": 13,
    }


def test_throughput_is_tokens_a_second_a_device_and_stages_are_timed_per_token():
    seconds = {"gen": 3.5, "reward": 0.5, "update_actor": 8.0, "step": 16.0}
    metrics = timing_metrics(seconds, table(), num_devices=2)
    assert metrics == {
        "timing_s/gen": 3.5,
        "timing_s/reward": 0.5,
        "timing_s/update_actor": 8.0,
        "timing_s/step": 16.0,
        "timing_per_token_ms/gen": 500.0,  # over 7 response tokens
        "timing_per_token_ms/update_actor": 500.0,  # over 16 tokens
        "perf/total_num_tokens": 16,
        "perf/time_per_step": 16.0,
        "perf/throughput": 0.5,
    }


def test_memory_of_the_host_is_reported_in_gib():
    metrics = memory_metrics(torch.device("cpu"))
    assert set(metrics) == {"perf/cpu_memory_used_gb", "perf/cpu_memory_process_gb"}
    assert 0 < metrics["perf/cpu_memory_process_gb"] < 100_000


def test_empty_responses_and_an_empty_table_give_metrics_that_are_numbers_or_absent():
    nothing = {name: [[]] for name, column in ROWS.items() if isinstance(column[0], list)}
    one_empty = table(**nothing, finish_reason=["abort"], score=[0.0])
    metrics = data_metrics(one_empty, max_prompt_length=4) | rollout_mismatch_metrics(one_empty)
    assert metrics["critic/score/mean"] == 0.0
    assert metrics["response_length/mean"] == 0.0
    assert "critic/advantages/mean" not in metrics
    empty = one_empty.slice(0, 0)
    assert data_metrics(empty, max_prompt_length=4) | rollout_mismatch_metrics(empty) == {}
    assert "critic/vf_explained_var" not in metrics


def test_metrics_are_plain_floats_that_json_takes():
    metrics = data_metrics(table(), max_prompt_length=4) | rollout_mismatch_metrics(table())
    assert json.loads(json.dumps(metrics)) == metrics
    assert all(type(value) is float for value in metrics.values())


def test_a_stage_uses_its_share_of_what_all_its_devices_could_do_and_the_most_memory_of_one():
    ranks = [StageCost(flops=6e12, peak_flops=4e12, memory=3 << 30), StageCost(2e12, 4e12, 1 << 30)]
    assert stage_metrics("update_actor", ranks, seconds=2.0) == {
        "perf/mfu/actor": pytest.approx(0.5),
        "perf/stage_memory_gb/update_actor": 3.0,
    }
    assert stage_metrics("ref", [StageCost(6e12, 0.0, 0)], seconds=2.0) == {}  # a CPU's
