"""The metrics of a step, as pure functions of its table: name -> float.

Token statistics count only tokens that the policy generated (``response_mask`` 1). A column that does not exist
(``values`` without a critic) adds no metric.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import torch

from verl.algorithms.kl import LOG_RATIO_LIMIT
from verl.cluster.base import WorkerGroup
from verl.data.schema import ragged
from verl.memory.device_memory import peaks
from verl.plan import RunPlan

Metrics = dict[str, float]

GIB = 1024**3
BLOCK = 1 << 17  # tokens
# The tokens that a stage works on: those of the response, or those of prompt and response.
STAGES_PER_RESPONSE_TOKEN = ("gen",)
STAGES_PER_TOKEN = ("old_log_prob", "ref", "values", "adv", "update_critic", "update_actor")


def step_metrics(table: pa.Table, plan: RunPlan, workers: WorkerGroup, seconds: dict[str, float], step: int) -> Metrics:
    """All metrics of a finished step but those that its stages reported. seconds: wall time by stage."""
    return {
        "training/global_step": step,
        **data_metrics(table, max_prompt_length=plan.max_prompt_length),
        **rollout_mismatch_metrics(table),
        **reward_model_metrics(table),
        **seqlen_metrics(sequence_lengths(table), workers.shares(table)),
        **timing_metrics(seconds, table, num_devices=plan.world_size),
        **most_of(workers.call("memory_metrics").result()),
    }


def data_metrics(table: pa.Table, *, max_prompt_length: int) -> Metrics:
    """critic/{score,greedy_reward,rewards,advantages,returns,values}/*, critic/vf_explained_var, actor/entropy,
    *_length/*."""
    written = _written(table)
    metrics: Metrics = {}
    for name in ("score", "greedy_reward"):
        if name in table.column_names:
            metrics |= _spread(f"critic/{name}", table[name].to_numpy())
    if "token_rewards" in table.column_names:
        metrics |= _spread("critic/rewards", ragged(table, "token_rewards").row_sums())
    for name in ("advantages", "returns", "values"):
        if name in table.column_names:
            metrics |= _spread(f"critic/{name}", ragged(table, name).values[written])
    if {"values", "returns"} <= set(table.column_names):
        values, returns = (ragged(table, name).values[written] for name in ("values", "returns"))
        if np.isfinite(explained := explained_variance(values, returns)):
            metrics["critic/vf_explained_var"] = explained
    if "entropy" in table.column_names and len(entropy := ragged(table, "entropy").values[written]):
        metrics["actor/entropy"] = float(entropy.mean(dtype=np.float64))
    return metrics | length_metrics(table, max_prompt_length=max_prompt_length)


def length_metrics(table: pa.Table, *, max_prompt_length: int) -> Metrics:
    """{prompt,response}_length/{mean,max,min,clip_ratio}, in tokens; response/aborted_ratio.

    A response is clipped if it was cut at the length limit (finish_reason "length"), a prompt if it is as long as the
    limit.
    """
    prompts = ragged(table, "prompt_ids").lengths
    finish = np.array(table["finish_reason"].to_pylist(), dtype=object)
    metrics = _spread("prompt_length", prompts) | _spread("response_length", ragged(table, "response_ids").lengths)
    if len(table):
        metrics["prompt_length/clip_ratio"] = float(np.mean(prompts >= max_prompt_length))
        metrics["response_length/clip_ratio"] = float(np.mean(finish == "length"))
        metrics["response/aborted_ratio"] = float(np.mean(finish == "abort"))
    return metrics


def explained_variance(values: np.ndarray, returns: np.ndarray) -> float:
    """1 - var(returns - values) / var(returns): 1 is a perfect critic, 0 is no better than a constant. nan if
    all returns are equal."""
    if len(returns) < 2 or returns.min() == returns.max():
        return float("nan")
    errors = np.subtract(returns, values, dtype=np.float64)
    return float(1.0 - np.var(errors) / np.var(returns, dtype=np.float64))


def rollout_mismatch_metrics(table: pa.Table) -> Metrics:
    """How far the engine's log-probs are from the trainer's, over the same tokens and weights.

    training/rollout_probs_diff_{max,mean,std}: of |p_rollout - p_trainer|;
    training/rollout_log_probs_diff_{max,mean}: of |log p_rollout - log p_trainer|, in nats;
    training/rollout_log_probs_diff_over_0.1: the share of tokens where that is over 0.1 (half of PPO's clip range);
    training/rollout_importance_ratio_{mean,max,min}: of p_trainer / p_rollout, the log of it cut to +-20;
    training/rollout_kl_{k1,k3}: estimates of KL(rollout || trainer) a token, in nats, of which k3 is never negative.
    """
    written = _written(table)
    rollout, trainer = (ragged(table, name).values[written] for name in ("rollout_log_probs", "old_log_probs"))
    if not len(rollout):
        return {}
    probs, logs, over, ratio, k1, k3 = (_Running() for _ in range(6))
    for start in range(0, len(rollout), BLOCK):
        ours, theirs = (column[start : start + BLOCK].astype(np.float64) for column in (trainer, rollout))
        log_ratio = np.clip(ours - theirs, -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        probs.add(np.abs(np.exp(theirs) - np.exp(ours)))
        logs.add(np.abs(theirs - ours))
        over.add(np.abs(theirs - ours) > 0.1)
        ratio.add(np.exp(log_ratio))
        k1.add(theirs - ours)
        k3.add(np.expm1(log_ratio) - log_ratio)
    return {
        "training/rollout_probs_diff_max": probs.most,
        "training/rollout_probs_diff_mean": probs.mean,
        "training/rollout_probs_diff_std": probs.std,
        "training/rollout_log_probs_diff_max": logs.most,
        "training/rollout_log_probs_diff_mean": logs.mean,
        "training/rollout_log_probs_diff_over_0.1": over.mean,
        "training/rollout_importance_ratio_mean": ratio.mean,
        "training/rollout_importance_ratio_max": ratio.most,
        "training/rollout_importance_ratio_min": ratio.least,
        "training/rollout_kl_k1": k1.mean,
        "training/rollout_kl_k3": k3.mean,
    }


class _Running:
    """Statistics of numbers that come block by block, so that only a block is held in float64."""

    def __init__(self) -> None:
        self._count, self._sum, self._squares = 0, 0.0, 0.0
        self.most, self.least = float("-inf"), float("inf")

    def add(self, values: np.ndarray) -> None:
        self._count += len(values)
        self._sum += float(values.sum(dtype=np.float64))
        self._squares += float(np.square(values, dtype=np.float64).sum())
        self.most = float(np.maximum(self.most, values.max()))  # nan where there is one
        self.least = float(np.minimum(self.least, values.min()))

    @property
    def mean(self) -> float:
        return self._sum / self._count

    @property
    def std(self) -> float:
        return max(self._squares / self._count - self.mean**2, 0.0) ** 0.5


def sequence_lengths(table: pa.Table) -> np.ndarray:
    """int64, shape (B,): prompt and response tokens of each row."""
    return ragged(table, "prompt_ids").lengths + ragged(table, "response_ids").lengths


def seqlen_metrics(lengths: np.ndarray, shares: list[np.ndarray]) -> Metrics:
    """global_seqlen/*, in tokens a rank. lengths: sequence_lengths; shares: each rank's row positions.

    min, max, minmax_diff: if ranks got the rows in order. balanced_min, balanced_max: with the shares that they got.
    """
    in_order = [part.sum() for part in np.array_split(lengths, len(shares))]
    balanced = [lengths[share].sum() for share in shares]
    return {
        "global_seqlen/min": float(min(in_order)),
        "global_seqlen/max": float(max(in_order)),
        "global_seqlen/minmax_diff": float(max(in_order) - min(in_order)),
        "global_seqlen/balanced_min": float(min(balanced)),
        "global_seqlen/balanced_max": float(max(balanced)),
        "global_seqlen/mean": float(lengths.sum() / len(shares)),
    }


def timing_metrics(seconds: dict[str, float], table: pa.Table, *, num_devices: int) -> Metrics:
    """timing_s/*, timing_per_token_ms/* and perf/{total_num_tokens,time_per_step,throughput}.

    seconds: wall time of each stage ("gen", "reward", "old_log_prob", "ref", "values", "adv", "update_critic",
    "update_actor", ...) and of the whole "step". Throughput: prompt and response tokens a second a device.
    """
    response_tokens = int(ragged(table, "response_ids").lengths.sum())
    total_tokens = int(sequence_lengths(table).sum())
    metrics: Metrics = {f"timing_s/{stage}": value for stage, value in seconds.items()}
    for stages, tokens in ((STAGES_PER_RESPONSE_TOKEN, response_tokens), (STAGES_PER_TOKEN, total_tokens)):
        for stage in stages:
            if stage in seconds and tokens:
                metrics[f"timing_per_token_ms/{stage}"] = 1000.0 * seconds[stage] / tokens
    metrics["perf/total_num_tokens"] = float(total_tokens)
    if "step" in seconds:
        metrics["perf/time_per_step"] = seconds["step"]
        metrics["perf/throughput"] = total_tokens / (seconds["step"] * num_devices)
    return metrics


class StageCost(NamedTuple):
    """The cost of a stage on one rank. flops: operations of the model. peak_flops: operations a second that the device
    can do; 0 if unknown. memory: peak bytes of tensors on the device."""

    flops: float
    peak_flops: float
    memory: int


def stage_metrics(name: str, ranks: Sequence[StageCost], seconds: float) -> Metrics:
    """perf/mfu/{name} and perf/stage_memory_gb/{name} (GiB, of the rank with the most), if they are known."""
    metrics, could = {}, seconds * sum(cost.peak_flops for cost in ranks)
    if could:
        metrics[f"perf/mfu/{name.removeprefix('update_')}"] = sum(cost.flops for cost in ranks) / could
    if memory := max(cost.memory for cost in ranks):
        metrics[f"perf/stage_memory_gb/{name}"] = memory / GIB
    return metrics


def most_of(ranks: Sequence[Metrics]) -> Metrics:
    """The maximum of each metric over the ranks."""
    return {name: max(of_rank[name] for of_rank in ranks) for name in ranks[0]}


def memory_metrics(device: torch.device | None = None) -> Metrics:
    """In GiB: perf/cpu_memory_used_gb (this machine) and perf/cpu_memory_process_gb (this process, resident). On
    CUDA also perf/max_memory_{allocated,reserved}_gb (this process, since it began) and perf/device_memory_used_gb
    (all processes)."""
    metrics = {
        "perf/cpu_memory_used_gb": psutil.virtual_memory().used / GIB,
        "perf/cpu_memory_process_gb": psutil.Process().memory_info().rss / GIB,
    }
    if device is not None and device.type == "cuda":
        metrics |= {f"perf/max_memory_{kind}_gb": most / GIB for kind, most in peaks(device).items()}
        free, total = torch.cuda.mem_get_info(device)
        metrics["perf/device_memory_used_gb"] = (total - free) / GIB
    return metrics


def _written(table: pa.Table) -> np.ndarray | slice:
    """Index of the tokens that the policy generated. A full slice for all tokens, so that nothing is copied."""
    written = ragged(table, "response_mask").values > 0
    return slice(None) if written.all() else written


def _spread(name: str, values: np.ndarray) -> Metrics:
    if not len(values):
        return {}
    return {
        f"{name}/mean": float(np.mean(values, dtype=np.float64)),
        f"{name}/max": float(np.max(values)),
        f"{name}/min": float(np.min(values)),
    }


def reward_model_metrics(table: pa.Table) -> Metrics:
    """reward_model/score/mean; empty without a reward model."""
    if "reward_model_score" not in table.column_names:
        return {}
    return {"reward_model/score/mean": float(table["reward_model_score"].to_numpy().mean())}
