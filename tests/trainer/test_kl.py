"""KL estimators, the penalty inside the reward, and the controllers of its coefficient."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.kl import AdaptiveKL, FixedKL, apply_kl_penalty, kl_control, kl_estimate, place_scores
from verl.data.ragged import Ragged

NAIVE = {
    "k1": lambda p, q: p - q,
    "abs": lambda p, q: abs(p - q),
    "k2": lambda p, q: (p - q) ** 2 / 2,
    "k3": lambda p, q: math.exp(q - p) - (q - p) - 1,
}
ALIASES = {"kl": "k1", "mse": "k2", "low_var_kl": "k3"}

log_prob = st.floats(-2, 0)


def rows(lists, dtype=np.float32) -> Ragged:
    return Ragged.from_rows([np.array(row, dtype) for row in lists], dtype)


def estimate(p, q, kind):
    return kl_estimate(torch.tensor(p, dtype=torch.float64), torch.tensor(q, dtype=torch.float64), kind)


@given(log_prob, log_prob, st.sampled_from([*NAIVE, *ALIASES]))
def test_each_estimator_is_its_formula(p, q, kind):
    assert estimate(p, q, kind).item() == pytest.approx(NAIVE[ALIASES.get(kind, kind)](p, q), abs=1e-12)


@given(st.floats(-1e4, 0), st.floats(-1e4, 0))
def test_k3_is_never_negative_nor_above_its_limit(p, q):
    assert 0 <= estimate(p, q, "k3").item() <= 10
    assert 0 <= kl_estimate(torch.tensor(p), torch.tensor(q), "k3").item() <= 10


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.integers(0, 10))
def test_k1_and_k3_both_have_the_true_kl_as_expectation(logits, seed):
    policy = torch.tensor(logits, dtype=torch.float64).log_softmax(0)
    reference = torch.from_numpy(np.random.default_rng(seed).normal(size=len(logits))).log_softmax(0)
    true_kl = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=policy), torch.distributions.Categorical(logits=reference)
    )
    for kind in ("k1", "k3"):
        expectation = (policy.exp() * kl_estimate(policy, reference, kind)).sum()
        assert expectation.item() == pytest.approx(true_kl.item(), abs=1e-9)


@pytest.mark.parametrize("kind", NAIVE)
def test_the_gradient_of_each_estimator_is_that_of_finite_differences(kind):
    p = torch.tensor([-0.3, -1.2, -2.0], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([-0.5, -0.4, -2.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda p: kl_estimate(p, q, kind), p)


def test_k3_of_policies_far_apart_is_ten_with_no_gradient_in_float32():
    p = torch.tensor([-200.0, 0.0, -90.0], requires_grad=True)
    kl = kl_estimate(p, torch.tensor([0.0, -200.0, -75.0]), "k3")
    kl.sum().backward()
    assert kl.tolist() == [10.0, 10.0, 10.0]
    assert p.grad.tolist() == [0.0, 0.0, 0.0]


def test_an_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="k4"):
        estimate(0.0, 0.0, "k4")


# ---- in the reward


def test_scores_stand_on_the_last_token_that_the_policy_wrote():
    mask = rows([[1, 1, 0], [], [0, 1], [0, 0]], np.int8)
    rewards = place_scores(np.array([5.0, 6.0, 7.0, 8.0]), mask)
    assert [rewards[b].tolist() for b in range(4)] == [[0, 5, 0], [], [0, 7], [0, 0]]
    assert rewards.values.dtype == np.float32


masks = st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=5)


@given(masks, st.integers(0, 99), st.sampled_from([*NAIVE]), st.floats(0, 1))
def test_the_penalised_reward_is_the_score_less_the_kl_of_each_token(mask_rows, seed, kind, coef):
    rng = np.random.default_rng(seed)
    mask = rows(mask_rows, np.int8)
    old, ref = (mask.like(rng.uniform(-2, 0, len(mask.values)).astype(np.float32)) for _ in range(2))
    old.values[mask.values == 0] = np.nan
    ref.values[mask.values == 0] = -np.inf
    scores = rng.normal(size=len(mask))

    rewards, batch_kl = apply_kl_penalty(scores, old, ref, mask, coef, kind)

    token_means = []
    for b, row in enumerate(mask_rows):
        written = [t for t, m in enumerate(row) if m]
        kl = {t: NAIVE[kind](float(old[b][t]), float(ref[b][t])) for t in written}
        expected = [
            -coef * kl.get(t, 0.0) + (scores[b] if written and t == written[-1] else 0) for t in range(len(row))
        ]
        np.testing.assert_allclose(rewards[b], expected, rtol=1e-5, atol=1e-6)
        if written:
            token_means.append(sum(kl.values()) / len(kl))
    assert batch_kl == pytest.approx(np.mean(token_means) if token_means else 0.0, abs=1e-9)


# ---- the coefficient


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.1, 1.0), (0.11, 1 + 0.1 * 256 / 10_000), (5.0, 1 + 0.2 * 256 / 10_000), (0.0, 1 - 0.2 * 256 / 10_000)],
)
def test_the_adaptive_coefficient_follows_ziegler_et_al(kl, factor):
    control = AdaptiveKL(0.002, target=0.1, horizon=10_000)
    control.update(kl, num_sequences=256)
    assert control.coef == pytest.approx(0.002 * factor, rel=1e-9)


def test_the_adaptive_coefficient_brings_the_kl_to_its_target():
    """A policy whose KL falls as the coefficient rises: kl = 0.01 / coef."""
    control = AdaptiveKL(0.001, target=0.5, horizon=1000)
    for _ in range(500):
        control.update(0.01 / control.coef, num_sequences=128)
    assert 0.01 / control.coef == pytest.approx(0.5, rel=0.01)


def test_a_kl_that_is_not_finite_leaves_the_coefficient_alone():
    control = AdaptiveKL(0.002, target=0.1, horizon=100)
    control.update(math.nan, 10)
    control.update(math.inf, 10)
    assert control.coef == 0.002


def test_the_adaptive_coefficient_survives_a_checkpoint_and_the_fixed_one_is_the_configs():
    adaptive = AdaptiveKL(0.002, target=0.1, horizon=100)
    adaptive.update(1.0, 10)
    resumed = AdaptiveKL(0.002, target=0.1, horizon=100)
    resumed.load_state_dict(adaptive.state_dict())
    assert resumed.coef == adaptive.coef

    fixed = FixedKL(0.5)
    fixed.update(100.0, 10)
    fixed.load_state_dict(adaptive.state_dict())
    assert fixed.coef == 0.5

    resumed.load_state_dict(fixed.state_dict())
    assert resumed.coef == adaptive.coef


def test_the_config_chooses_the_controller():
    section = SimpleNamespace(type="fixed", kl_coef=0.1, target_kl=0.2, horizon=7)
    assert isinstance(kl_control(section), FixedKL)
    section.type = "adaptive"
    control = kl_control(section)
    assert isinstance(control, AdaptiveKL)
    assert (control.coef, control.target, control.horizon) == (0.1, 0.2, 7)
