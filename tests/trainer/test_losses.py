"""PPO's losses against plain loops; additive over any split; gradients by finite differences."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.losses import (
    AGGREGATION_MODES,
    aggregation_weights,
    policy_loss,
    value_loss,
)
from verl.algorithms.policy_losses import vanilla
from verl.config.sections.models import ActorConfig
from verl.data.ragged import Ragged
from verl.trainer.sft.loss import nll_loss

PPO = ActorConfig(
    clip_ratio_low=0.2,
    clip_ratio_high=0.28,
    clip_ratio_c=3.0,
    entropy_coeff=0.01,
    use_kl_loss=True,
    kl_loss_coef=0.05,
    kl_loss_type="k3",
)
PLAIN = PPO.model_copy(update={"entropy_coeff": 0.0, "use_kl_loss": False})
ppo_loss = partial(policy_loss, token_loss=vanilla)

masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6)


def rows(lists, dtype=np.float32) -> Ragged:
    return Ragged.from_rows([np.array(row, dtype) for row in lists], dtype)


def sample(mask_rows, mode="token-mean", seed=0, spread=1.0):
    """Outputs and batch in float64, as (T,) tensors; policies ``spread`` apart, so that every clip is met."""
    rng = np.random.default_rng(seed)
    mask = rows(mask_rows, np.int8)
    size = len(mask.values)

    def column(low, high):
        return torch.from_numpy(rng.uniform(low, high, size))

    old = column(-3, -1)
    outputs = {"log_probs": old + spread * column(-1, 1) * 2, "entropy": column(0, 2), "values": column(-2, 2)}
    batch = {
        "response_mask": torch.from_numpy(mask.values),
        "loss_weights": torch.from_numpy(aggregation_weights(mask, mode, 8).values).double(),
        "advantages": column(-2, 2),
        "old_log_probs": old,
        "ref_log_probs": column(-3, -1),
        "values": outputs["values"] + column(-1, 1),
        "returns": column(-2, 2),
    }
    return outputs, batch, int((mask.values > 0).sum())


# ---- aggregation


def aggregate(losses_of_rows, mode, max_response_length):
    """The four modes as their definitions read, on lists of the written tokens' losses."""
    seqs = [seq for seq in losses_of_rows if seq]
    if not seqs:
        return 0.0
    match mode:
        case "token-mean":
            tokens = [loss for seq in seqs for loss in seq]
            return sum(tokens) / len(tokens)
        case "seq-mean-token-sum":
            return sum(sum(seq) for seq in seqs) / len(seqs)
        case "seq-mean-token-mean":
            return sum(sum(seq) / len(seq) for seq in seqs) / len(seqs)
        case "seq-mean-token-sum-norm":
            return sum(sum(seq) / max_response_length for seq in seqs) / len(seqs)


@given(masks, st.sampled_from(AGGREGATION_MODES), st.integers(0, 99))
def test_weights_give_each_modes_loss_as_a_plain_sum(mask_rows, mode, seed):
    mask = rows(mask_rows, np.int8)
    losses = mask.like(np.random.default_rng(seed).normal(size=len(mask.values)))
    weights = aggregation_weights(mask, mode, 8)
    written = [[float(loss) for loss, m in zip(losses[b], row, strict=True) if m] for b, row in enumerate(mask_rows)]
    assert weights.values.dtype == np.float32
    assert not weights.values[mask.values == 0].any()
    assert (weights.values @ losses.values) == pytest.approx(aggregate(written, mode, 8), rel=1e-5, abs=1e-6)


@given(masks, st.sampled_from(["token-mean", "seq-mean-token-mean"]))
def test_weights_of_a_mean_sum_to_one(mask_rows, mode):
    total = aggregation_weights(rows(mask_rows, np.int8), mode, 8).values.sum()
    assert total == pytest.approx(1.0 if any(map(any, mask_rows)) else 0.0, rel=1e-5)


def test_a_sequence_that_the_policy_wrote_nothing_of_does_not_count():
    weights = aggregation_weights(rows([[1, 1], [0], []], np.int8), "seq-mean-token-mean", 8)
    assert weights.values.tolist() == [0.5, 0.5, 0.0]


def test_an_unknown_aggregation_mode_is_an_error():
    with pytest.raises(ValueError, match="token-median"):
        aggregation_weights(rows([[1]], np.int8), "token-median", 8)


# ---- policy


def naive_ppo(outputs, batch, num_tokens, settings):
    assert settings.kl_loss_type == "k3"
    clip_low, clip_high = settings.clip_ratio_low, settings.clip_ratio_high
    sums = dict.fromkeys(["pg_loss", "pg_clipfrac", "pg_clipfrac_lower", "ppo_kl", "entropy_loss", "kl_loss"], 0.0)
    for t in range(len(batch["response_mask"])):
        if not batch["response_mask"][t]:
            continue
        weight, advantage = float(batch["loss_weights"][t]), float(batch["advantages"][t])
        log_prob, old = float(outputs["log_probs"][t]), float(batch["old_log_probs"][t])
        ratio = math.exp(log_prob - old)
        objective = min(advantage * ratio, advantage * min(max(ratio, 1 - clip_low), 1 + clip_high))
        if advantage < 0 and objective < settings.clip_ratio_c * advantage:
            objective = settings.clip_ratio_c * advantage
            sums["pg_clipfrac_lower"] += 1 / num_tokens
        sums["pg_loss"] -= weight * objective
        if (advantage > 0 and ratio > 1 + clip_high) or (advantage < 0 and ratio < 1 - clip_low):
            sums["pg_clipfrac"] += 1 / num_tokens
        sums["ppo_kl"] += (old - log_prob) / num_tokens
        sums["entropy_loss"] += weight * float(outputs["entropy"][t])
        d = float(batch["ref_log_probs"][t]) - log_prob
        sums["kl_loss"] += weight * min(math.exp(d) - d - 1, 10.0)
    loss = sums["pg_loss"] - settings.entropy_coeff * sums["entropy_loss"] + settings.kl_loss_coef * sums["kl_loss"]
    return loss, {f"actor/{name}": value for name, value in sums.items()}


@given(masks, st.sampled_from(AGGREGATION_MODES), st.integers(0, 999))
def test_the_policy_loss_and_its_metrics_are_those_of_a_plain_loop(mask_rows, mode, seed):
    outputs, batch, num_tokens = sample(mask_rows, mode, seed)
    num_tokens = max(num_tokens, 1)
    loss, metrics = ppo_loss(outputs, batch, settings=PPO, num_tokens=num_tokens)
    expected_loss, expected_metrics = naive_ppo(outputs, batch, num_tokens, PPO)
    assert loss.item() == pytest.approx(expected_loss, rel=1e-6, abs=1e-9)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(
        expected_metrics, rel=1e-6, abs=1e-6
    )


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope"),
    [
        (1.0, 1.0, -1.0, -1.0),
        (1.0, 1.1, -1.1, -1.1),
        (1.0, 1.5, -1.28, 0.0),  # raised enough already
        (1.0, 0.5, -0.5, -0.5),  # never clipped from below while the advantage is positive
        (-1.0, 1.0, 1.0, 1.0),
        (-1.0, 0.5, 0.8, 0.0),  # lowered enough already
        (-1.0, 2.0, 2.0, 2.0),
        (-1.0, 5.0, 3.0, 0.0),  # dual clip
    ],
)
def test_the_surrogate_of_one_token(advantage, ratio, loss, slope):
    """Loss, and its slope in the log-prob: clipped tokens pull no further."""
    log_probs = torch.tensor([math.log(ratio)], requires_grad=True)
    batch = {
        "response_mask": torch.ones(1, dtype=torch.int8),
        "loss_weights": torch.ones(1),
        "advantages": torch.tensor([advantage]),
        "old_log_probs": torch.zeros(1),
    }
    value, _ = ppo_loss({"log_probs": log_probs}, batch, settings=PLAIN, num_tokens=1)
    value.backward()
    assert value.item() == pytest.approx(loss, rel=1e-6)
    assert log_probs.grad.item() == pytest.approx(slope, rel=1e-6)


@given(masks, st.integers(0, 99))
def test_at_ratio_one_the_gradient_is_the_policy_gradient(mask_rows, seed):
    outputs, batch, num_tokens = sample(mask_rows, seed=seed, spread=0.0)
    log_probs = outputs["log_probs"].clone().requires_grad_()
    loss, _ = ppo_loss({"log_probs": log_probs}, batch, settings=PLAIN, num_tokens=max(num_tokens, 1))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(gradient, -batch["loss_weights"] * batch["advantages"])


@given(masks, st.integers(0, 99))
def test_without_advantages_there_is_no_gradient(mask_rows, seed):
    outputs, batch, num_tokens = sample(mask_rows, seed=seed)
    batch["advantages"] = torch.zeros_like(batch["advantages"])
    log_probs = outputs["log_probs"].clone().requires_grad_()
    loss, _ = ppo_loss({"log_probs": log_probs}, batch, settings=PLAIN, num_tokens=max(num_tokens, 1))
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert loss.item() == 0
    assert not gradient.any()


@given(st.floats(-100, 100, width=32), st.floats(-5, 5, width=32))
def test_the_loss_of_a_token_is_bounded_where_the_ratio_could_explode(log_ratio, advantage):
    batch = {
        "response_mask": torch.ones(1),
        "loss_weights": torch.ones(1),
        "advantages": torch.tensor([advantage]),
        "old_log_probs": torch.zeros(1),
    }
    log_probs = torch.tensor([log_ratio], requires_grad=True)
    loss, _ = ppo_loss({"log_probs": log_probs}, batch, settings=PLAIN, num_tokens=1)
    loss.backward()
    bound = abs(advantage) * (1.28 if advantage > 0 else 3.0)
    assert abs(loss.item()) <= bound * (1 + 1e-6)
    assert abs(log_probs.grad.item()) <= bound * (1 + 1e-6)


def test_metrics_carry_no_gradient_and_absent_columns_are_not_asked_for():
    outputs, batch, num_tokens = sample([[1, 1, 0]])
    outputs = {"log_probs": outputs["log_probs"].requires_grad_()}
    del batch["ref_log_probs"]
    _, metrics = ppo_loss(outputs, batch, settings=PLAIN, num_tokens=num_tokens)
    assert set(metrics) == {"actor/pg_loss", "actor/pg_clipfrac", "actor/pg_clipfrac_lower", "actor/ppo_kl"}
    assert not any(value.requires_grad for value in metrics.values())


# ---- value


def naive_value_loss(outputs, batch, num_tokens, cliprange_value):
    sums = dict.fromkeys(["vf_loss", "vf_clipfrac", "vpred_mean"], 0.0)
    for t in range(len(batch["response_mask"])):
        if batch["response_mask"][t]:
            value, old, target = (float(c[t]) for c in (outputs["values"], batch["values"], batch["returns"]))
            near = min(max(value, old - cliprange_value), old + cliprange_value)
            worse = (near - target) ** 2 > (value - target) ** 2
            sums["vf_loss"] += float(batch["loss_weights"][t]) * 0.5 * max((value - target) ** 2, (near - target) ** 2)
            sums["vf_clipfrac"] += worse / num_tokens
            sums["vpred_mean"] += value / num_tokens
    return {f"critic/{name}": value for name, value in sums.items()}


@given(masks, st.sampled_from(AGGREGATION_MODES), st.integers(0, 999))
def test_the_value_loss_and_its_metrics_are_those_of_a_plain_loop(mask_rows, mode, seed):
    outputs, batch, num_tokens = sample(mask_rows, mode, seed)
    num_tokens = max(num_tokens, 1)
    loss, metrics = value_loss(outputs, batch, cliprange_value=0.5, num_tokens=num_tokens)
    expected = naive_value_loss(outputs, batch, num_tokens, 0.5)
    assert loss.item() == pytest.approx(expected["critic/vf_loss"], rel=1e-6, abs=1e-9)
    assert {name: value.item() for name, value in metrics.items()} == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_values_at_their_returns_have_no_loss_and_no_gradient():
    _, batch, num_tokens = sample([[1, 1, 1]])
    values = batch["returns"].clone().requires_grad_()
    loss, _ = value_loss(
        {"values": values}, {**batch, "values": batch["returns"]}, cliprange_value=0.5, num_tokens=num_tokens
    )
    loss.backward()
    assert loss.item() == 0
    assert not values.grad.any()


# ---- what holds for all of them

LOSSES = {
    "policy": (partial(ppo_loss, settings=PPO), ("log_probs", "entropy")),
    "value": (partial(value_loss, cliprange_value=0.5), ("values",)),
    "sft": (lambda outputs, batch, num_tokens: nll_loss(outputs, batch), ("log_probs",)),
}
each_loss = pytest.mark.parametrize(("loss_fn", "names"), LOSSES.values(), ids=LOSSES.keys())


@each_loss
@given(
    mask_rows=masks, mode=st.sampled_from(AGGREGATION_MODES), seed=st.integers(0, 99), cuts=st.sets(st.integers(0, 36))
)
def test_losses_metrics_and_gradients_add_up_over_any_split_into_micro_batches(
    loss_fn, names, mask_rows, mode, seed, cuts
):
    outputs, batch, num_tokens = sample(mask_rows, mode, seed)
    num_tokens = max(num_tokens, 1)
    size = len(batch["response_mask"])
    edges = [0, *sorted(cut for cut in cuts if cut < size), size]

    def run(spans):
        leaves = {name: outputs[name].clone().requires_grad_() for name in names}
        total, metrics = torch.zeros((), dtype=torch.float64), {}
        for start, end in spans:
            cut_outputs = {name: leaf[start:end] for name, leaf in leaves.items()}
            cut_batch = {name: column[start:end] for name, column in batch.items()}
            loss, part = loss_fn(cut_outputs, cut_batch, num_tokens=num_tokens)
            loss.backward()
            total += loss.detach()
            for name, value in part.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
        return total, metrics, torch.stack([leaf.grad for leaf in leaves.values()])

    whole, split = run([(0, size)]), run(itertools.pairwise(edges))
    torch.testing.assert_close(split[0], whole[0], rtol=1e-9, atol=1e-9)
    assert split[1] == pytest.approx(whole[1], rel=1e-6, abs=1e-6)
    torch.testing.assert_close(split[2], whole[2], rtol=0, atol=0)


@each_loss
@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_finite_differences(loss_fn, names, seed):
    outputs, batch, num_tokens = sample([[1, 1, 0, 1], [1, 1], [0], [1, 1, 1, 1, 1]], seed=seed)
    leaves = [outputs[name].clone().requires_grad_() for name in names]

    def loss(*tensors):
        return loss_fn(dict(zip(names, tensors, strict=True)), batch, num_tokens=num_tokens)[0]

    assert torch.autograd.gradcheck(loss, leaves)


@each_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_tokens_that_are_masked_out_contribute_nothing_whatever_they_hold(loss_fn, names, junk):
    outputs, batch, num_tokens = sample([[1, 0, 1], [0, 1]])
    masked = batch["response_mask"] == 0

    def run(fill):
        leaves = {n: torch.where(masked, fill, outputs[n]).requires_grad_() for n in names}
        columns = {n: torch.where(masked, fill, c) for n, c in batch.items() if n != "response_mask"}
        columns["response_mask"] = batch["response_mask"]
        loss, metrics = loss_fn(leaves, columns, num_tokens=num_tokens)
        loss.backward()
        return loss, metrics, [leaf.grad for leaf in leaves.values()]

    clean, dirty = run(0.0), run(junk)
    torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert all(not grad[masked].any() for grad in dirty[2])


@each_loss
def test_a_micro_batch_without_tokens_has_a_loss_of_zero_that_can_be_differentiated(loss_fn, names):
    outputs, batch, _ = sample([[1]])
    leaves = {name: outputs[name][:0].requires_grad_() for name in names}
    loss, _ = loss_fn(leaves, {name: column[:0] for name, column in batch.items()}, num_tokens=7)
    loss.backward()
    assert loss.item() == 0


def test_the_supervised_loss_is_torchs_cross_entropy():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 11), torch.randint(0, 11, (6,))
    mask = rows([[1, 1, 0], [0, 1, 1]], np.int8)
    batch = {
        "response_mask": torch.from_numpy(mask.values),
        "loss_weights": torch.from_numpy(aggregation_weights(mask, "token-mean", 8).values),
    }
    log_probs = logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    loss, metrics = nll_loss({"log_probs": log_probs}, batch)
    ignored = torch.where(batch["response_mask"] > 0, labels, -100)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, ignored))
    assert metrics["train/loss"] == loss
