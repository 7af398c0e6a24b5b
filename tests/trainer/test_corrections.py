"""Importance weights against plain loops, and what they do to the policy loss."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.corrections import importance_weights
from verl.algorithms.losses import aggregation_weights, policy_loss, value_loss
from verl.algorithms.policy_losses import vanilla
from verl.config.sections.actor import ActorConfig
from verl.config.sections.algorithm import RolloutCorrectionConfig
from verl.data.ragged import Ragged

LOSS = ActorConfig(
    clip_ratio_low=0.2,
    clip_ratio_high=0.28,
    clip_ratio_c=3.0,
    entropy_coeff=0.01,
    use_kl_loss=True,
    kl_loss_coef=0.05,
    kl_loss_type="k3",
)
masks = st.lists(st.lists(st.integers(0, 1), min_size=0, max_size=6), min_size=1, max_size=6)
settings = st.builds(
    RolloutCorrectionConfig,
    level=st.sampled_from(["token", "sequence"]),
    mode=st.sampled_from(["clamp", "mask"]),
    threshold=st.floats(1, 4),
    threshold_lower=st.none() | st.floats(0.1, 1),
)


def rows(lists, dtype=np.float32) -> Ragged:
    return Ragged.from_rows([np.array(row, dtype) for row in lists], dtype)


def case(mask_rows, seed=0, spread=1.0):
    """(old_log_probs, rollout_log_probs, response_mask); what the mask leaves out is nan."""
    rng = np.random.default_rng(seed)
    mask = rows(mask_rows, np.int8)
    old = rng.uniform(-3, -1, len(mask.values))
    rollout = np.where(mask.values > 0, old + spread * rng.normal(size=len(old)), np.nan)
    return mask.like(old.astype(np.float32)), mask.like(rollout.astype(np.float32)), mask


def of(level="token", mode="clamp", **more) -> RolloutCorrectionConfig:
    return RolloutCorrectionConfig(level=level, mode=mode, **more)


def naive_weights(old, rollout, mask, chosen):
    """Each response's weights as a list, and the units' weights and whether they were out of bounds."""
    weights, units = [], []
    for b in range(len(mask)):
        ratios = [math.exp(float(o) - float(r)) for o, r, m in zip(old[b], rollout[b], mask[b], strict=True) if m]
        if chosen.level == "sequence":
            ratios = [math.prod(ratios)] * len(ratios)
        bounded = []
        for ratio in ratios:
            if chosen.mode == "clamp":
                bounded.append((min(ratio, chosen.threshold), ratio > chosen.threshold))
            else:
                inside = (chosen.threshold_lower or 0) <= ratio <= chosen.threshold
                bounded.append((ratio if inside else 0.0, not inside))
        units += bounded[:1] if chosen.level == "sequence" else bounded
        left = iter(bounded)
        weights += [next(left)[0] if m else 0.0 for m in mask[b]]
    return weights, units


@given(masks, st.integers(0, 999), settings)
def test_weights_and_metrics_are_those_of_a_plain_loop(mask_rows, seed, chosen):
    old, rollout, mask = case(mask_rows, seed)
    weights, metrics = importance_weights(old, rollout, mask, chosen)
    expected, units = naive_weights(old, rollout, mask, chosen)
    assert weights.values.dtype == np.float32
    assert weights.values.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-9)
    if not units:
        assert metrics == {}
        return
    found = [weight for weight, _ in units]
    squares = sum(weight**2 for weight in found)
    assert metrics == pytest.approx(
        {
            "training/rollout_is_mean": sum(found) / len(found),
            "training/rollout_is_max": max(found),
            "training/rollout_is_min": min(found),
            "training/rollout_is_cut": sum(out for _, out in units) / len(units),
            "training/rollout_is_eff_sample_size": sum(found) ** 2 / (len(found) * squares) if squares else 0.0,
        },
        rel=1e-5,
        abs=1e-9,
    )


@given(masks, settings)
def test_an_engine_that_agrees_with_the_trainer_has_weights_of_one(mask_rows, chosen):
    old, rollout, mask = case(mask_rows, spread=0.0)
    weights, metrics = importance_weights(old, rollout, mask, chosen)
    assert weights.values.tolist() == (mask.values > 0).tolist()
    if mask.values.any():
        assert metrics["training/rollout_is_cut"] == 0.0
        assert metrics["training/rollout_is_eff_sample_size"] == pytest.approx(1.0)


def test_the_weighted_mean_over_the_engines_tokens_is_the_trainers_mean():
    """What importance sampling is for: with bounds that never bind, E_q[p / q f] = E_p[f]."""
    rng = np.random.default_rng(0)
    trainer, engine, value = np.array([0.6, 0.3, 0.1]), np.array([0.4, 0.3, 0.3]), np.array([1.0, 2.0, 4.0])
    drawn = rng.choice(3, size=200_000, p=engine)
    column = Ragged.from_rows([drawn], np.int64)
    old, rollout, mask = (column.like(x) for x in (np.log(trainer[drawn]), np.log(engine[drawn]), np.ones(len(drawn))))
    weights, _ = importance_weights(old, rollout, mask, of(threshold=1e3))
    assert np.mean(weights.values * value[drawn]) == pytest.approx(trainer @ value, abs=0.02)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["clamp", "mask"])
def test_differences_that_would_overflow_stay_within_bounds(level, mode):
    old = rows([[-1000.0, -0.5], [-0.5, -0.5]])
    rollout = rows([[-0.5, -0.5], [-np.inf, -1000.0]])
    weights, metrics = importance_weights(old, rollout, old.like(np.ones(4, np.int8)), of(level, mode))
    assert np.isfinite(weights.values).all()
    assert weights.values[0] == pytest.approx(0.0, abs=1e-8)
    assert weights.values[2] == weights.values[3] == (2.0 if mode == "clamp" else 0.0)
    assert all(math.isfinite(value) for value in metrics.values())


@pytest.mark.parametrize("mode", ["clamp", "mask"])
def test_a_log_prob_that_is_not_a_number_takes_its_token_or_sequence_out(mode):
    old, rollout = rows([[-1.0, -1.0], [-1.0]]), rows([[math.nan, -1.0], [-1.0]])
    mask = old.like(np.ones(3, np.int8))
    tokens, metrics = importance_weights(old, rollout, mask, of("token", mode))
    assert tokens.values.tolist() == [0.0, 1.0, 1.0]
    assert metrics["training/rollout_is_cut"] == pytest.approx(1 / 3)
    sequences, metrics = importance_weights(old, rollout, mask, of("sequence", mode))
    assert sequences.values.tolist() == [0.0, 0.0, 1.0]
    assert metrics["training/rollout_is_cut"] == 0.5


# ---- in the loss


def batch_of(mask_rows, seed, chosen, mode="token-mean"):
    old, rollout, mask = case(mask_rows, seed)
    rng = np.random.default_rng(seed + 1)

    def column():
        return torch.from_numpy(rng.uniform(-2, 2, len(mask.values)))

    batch = {
        "response_mask": torch.from_numpy(mask.values),
        "loss_weights": torch.from_numpy(aggregation_weights(mask, mode, 8).values).double(),
        "advantages": column(),
        "old_log_probs": torch.from_numpy(old.values).double(),
        "ref_log_probs": torch.from_numpy(old.values).double() + 0.3 * column(),
    }
    if chosen is not None:
        weights, _ = importance_weights(old, rollout, mask, chosen)
        batch["rollout_is_weights"] = torch.from_numpy(weights.values).double()
    outputs = {"log_probs": batch["old_log_probs"] + 0.3 * column(), "entropy": column().abs()}
    return outputs, batch, max(int((mask.values > 0).sum()), 1)


def run(outputs, batch, num_tokens, **changed):
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in outputs.items()}
    loss, metrics = policy_loss(
        leaves, batch, token_loss=vanilla, settings=LOSS.model_copy(update=changed), num_tokens=num_tokens
    )
    loss.backward()
    return SimpleNamespace(loss=loss.detach(), metrics=metrics, grad={name: leaf.grad for name, leaf in leaves.items()})


@given(masks.filter(lambda rows: any(map(any, rows))), st.integers(0, 99), settings)
def test_the_gradient_of_each_token_is_the_unweighted_one_times_its_weight(mask_rows, seed, chosen):
    outputs, batch, num_tokens = batch_of(mask_rows, seed, chosen)
    plain = {name: column for name, column in batch.items() if name != "rollout_is_weights"}
    only_pg = {"entropy_coeff": 0.0, "use_kl_loss": False}
    weighted, unweighted = run(outputs, batch, num_tokens, **only_pg), run(outputs, plain, num_tokens, **only_pg)
    weights = batch["rollout_is_weights"]
    torch.testing.assert_close(weighted.grad["log_probs"], weights * unweighted.grad["log_probs"], rtol=1e-12, atol=0)


@given(masks.filter(lambda rows: any(map(any, rows))), st.integers(0, 99), settings)
def test_entropy_kl_and_clip_fractions_are_not_weighted(mask_rows, seed, chosen):
    outputs, batch, num_tokens = batch_of(mask_rows, seed, chosen)
    plain = {name: column for name, column in batch.items() if name != "rollout_is_weights"}
    weighted, unweighted = run(outputs, batch, num_tokens), run(outputs, plain, num_tokens)
    for name, value in unweighted.metrics.items():
        if name != "actor/pg_loss":
            assert weighted.metrics[name] == value, name
    torch.testing.assert_close(weighted.grad["entropy"], unweighted.grad["entropy"], rtol=0, atol=0)
    shift = weighted.metrics["actor/pg_loss"] - unweighted.metrics["actor/pg_loss"]
    torch.testing.assert_close(weighted.loss - unweighted.loss, shift)


@given(masks, st.integers(0, 99))
def test_weights_of_one_leave_the_loss_and_its_gradient_as_they_are_to_the_bit(mask_rows, seed):
    outputs, batch, num_tokens = batch_of(mask_rows, seed, None)
    ones = {**batch, "rollout_is_weights": (batch["response_mask"] > 0).double()}
    plain, weighted = run(outputs, batch, num_tokens), run(outputs, ones, num_tokens)
    assert torch.equal(plain.loss, weighted.loss)
    assert torch.equal(plain.grad["log_probs"], weighted.grad["log_probs"])


@given(masks, st.integers(0, 99), settings, st.sets(st.integers(0, 36)))
def test_the_weighted_loss_adds_up_over_any_split_into_micro_batches(mask_rows, seed, chosen, cuts):
    outputs, batch, num_tokens = batch_of(mask_rows, seed, chosen, mode="seq-mean-token-mean")
    size = len(batch["response_mask"])
    whole = run(outputs, batch, num_tokens)
    parts = [
        run(
            {name: column[start:end] for name, column in outputs.items()},
            {name: column[start:end] for name, column in batch.items()},
            num_tokens,
        )
        for start, end in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < size), size])
    ]
    torch.testing.assert_close(sum(part.loss for part in parts), whole.loss, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.cat([part.grad["log_probs"] for part in parts]), whole.grad["log_probs"])


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_weights_of_tokens_that_are_masked_out_do_not_matter(junk):
    outputs, batch, num_tokens = batch_of([[1, 0, 1], [0, 1]], 0, of())
    masked = batch["response_mask"] == 0
    dirty = {**batch, "rollout_is_weights": torch.where(masked, junk, batch["rollout_is_weights"])}
    assert torch.equal(run(outputs, batch, num_tokens).loss, run(outputs, dirty, num_tokens).loss)


def test_the_critics_loss_is_not_weighted():
    values = torch.tensor([0.5, -0.5])
    batch = {
        "response_mask": torch.ones(2),
        "loss_weights": torch.full((2,), 0.5),
        "values": values,
        "returns": torch.zeros(2),
    }
    weighted = {**batch, "rollout_is_weights": torch.tensor([0.0, 2.0])}
    losses = [value_loss({"values": values}, b, cliprange_value=0.5, num_tokens=2)[0] for b in (batch, weighted)]
    assert torch.equal(*losses)
