"""The policy losses against loops over their papers' formulas, their gradients against finite differences of those."""

import math
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.algorithms.covariance import covariances
from verl.algorithms.loss_modes import LOSS_MODES, resolve, selected_tokens
from verl.algorithms.losses import aggregation_weights, loss_columns, policy_loss
from verl.config.sections.models import ActorConfig, PolicyLossConfig
from verl.data.ragged import Ragged
from verl.data.schema import with_columns
from verl.errors import UserError

SETTINGS = ActorConfig(
    clip_ratio_low=0.2,
    clip_ratio_high=0.3,
    clip_ratio_c=3.0,
    tau_pos=1.0,
    tau_neg=1.5,
    loss_agg_mode="seq-mean-token-mean",
    policy_loss=PolicyLossConfig(clip_cov_ratio=0.2, clip_cov_lb=0.1, clip_cov_ub=2.0, kl_cov_ratio=0.2),
)
LOW, HIGH, C, KL_COEF = 0.2, 0.3, 3.0, 0.1
MASKS = [[1, 1, 0, 1], [1], [1, 1, 1, 1, 1], [0], [0, 1, 1], [1, 1]]
masks = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=6), min_size=1, max_size=6)


def between(value, low, high):
    return min(max(value, low), high)


# A response's tokens, as lists: log-probs, the same with their gradient stopped, old log-probs, advantages, selected.


def naive_vanilla(log_probs, frozen, old, advantages, selected):
    losses = []
    for new, before, advantage in zip(log_probs, old, advantages, strict=True):
        ratio = math.exp(new - before)
        objective = min(ratio * advantage, between(ratio, 1 - LOW, 1 + HIGH) * advantage)
        losses.append(-max(objective, C * advantage) if advantage < 0 else -objective)
    return losses


def naive_gspo(log_probs, frozen, old, advantages, selected):
    """Equation 5 of the paper, on the response's (one) advantage."""
    s = math.exp(sum(new - before for new, before in zip(log_probs, old, strict=True)) / len(old))
    return [-min(s * a, between(s, 1 - LOW, 1 + HIGH) * a) for a in advantages]


def naive_cispo(log_probs, frozen, old, advantages, selected):
    weights = [between(math.exp(new - before), 1 - LOW, 1 + HIGH) for new, before in zip(frozen, old, strict=True)]
    return [-w * a * new for w, a, new in zip(weights, advantages, log_probs, strict=True)]


def naive_geo_mean(log_probs, frozen, old, advantages, selected):
    """The n-th root of a product of ratios, each the worse of itself and its clipped self for the objective."""
    (sign,) = {np.sign(a) for a in advantages}
    product = 1.0
    for new, before in zip(log_probs, old, strict=True):
        ratio = math.exp(new - before)
        near = between(ratio, math.exp(-LOW), math.exp(HIGH))
        product *= min(ratio, near) if sign > 0 else max(ratio, near)
    return [-a * product ** (1 / len(old)) for a in advantages]


def naive_sapo(log_probs, frozen, old, advantages, selected):
    losses = []
    for new, before, a in zip(log_probs, old, advantages, strict=True):
        tau = 1.0 if a > 0 else 1.5
        losses.append(-a * 4 / tau / (1 + math.exp(-tau * (math.exp(new - before) - 1))))
    return losses


def naive_gpg(log_probs, frozen, old, advantages, selected):
    return [-a * new for a, new in zip(advantages, log_probs, strict=True)]


def naive_clip_cov(log_probs, frozen, old, advantages, selected):
    losses = []
    for new, before, a, chosen in zip(log_probs, old, advantages, selected, strict=True):
        ratio = math.exp(new - before)
        losses.append(0.0 if chosen else -min(ratio * a, between(ratio, 1 - LOW, 1 + HIGH) * a))
    return losses


def naive_kl_cov(log_probs, frozen, old, advantages, selected):
    losses = []
    for new, before, a, chosen in zip(log_probs, old, advantages, selected, strict=True):
        losses.append(-a * math.exp(new - before) + (KL_COEF * abs(new - before) if chosen else 0.0))
    return losses


NAIVE = {name.removeprefix("naive_"): function for name, function in globals().items() if name.startswith("naive_")}
OF_RESPONSES = ("gspo", "geo_mean")  # defined for one advantage a response
each_loss = pytest.mark.parametrize("mode", LOSS_MODES)


def mini_batch(mode, mask_rows, seed=0, **changed) -> pa.Table:
    """Advantages and old log-probs; loss_weights and selected as the driver makes them."""
    rng = np.random.default_rng(seed)
    mask = Ragged.from_rows([np.array(row, np.int8) for row in mask_rows], np.int8)
    size = len(mask.values)
    advantages = mask.spread(rng.uniform(-2, 2, len(mask))) if mode in OF_RESPONSES else rng.uniform(-2, 2, size)
    columns = {"advantages": advantages, "old_log_probs": rng.uniform(-3, -1, size)}
    table = pa.table({"response_mask": mask.to_column()})
    table = with_columns(table, **{name: mask.like(values.astype(np.float32)) for name, values in columns.items()})
    return with_columns(table, **loss_columns(table, settings_of(mode, **changed), 8, (seed,)))


def settings_of(mode, **changed) -> ActorConfig:
    chosen = SETTINGS.policy_loss.model_copy(update={"loss_mode": mode})
    return SETTINGS.model_copy(update={"policy_loss": chosen, **changed})


def tensors_of(table: pa.Table, rows=None) -> dict[str, torch.Tensor]:
    """The columns of a micro-batch of these rows, floats in float64."""
    rows = range(len(table)) if rows is None else rows
    columns = {}
    for name in table.column_names:
        values = np.array([value for row in rows for value in table[name][row].as_py()])
        columns[name] = torch.from_numpy(values)
    lengths = [len(table["response_mask"][row]) for row in rows]
    columns["row_ids"] = torch.from_numpy(np.repeat(np.array(rows, np.int64), lengths))
    return columns


def moved(table: pa.Table, seed: int) -> np.ndarray:
    """Log-probs of a policy that is some updates on."""
    old = np.array([value for row in table["old_log_probs"].to_pylist() for value in row])
    return old + np.random.default_rng([seed, 1]).normal(0, 0.4, len(old))


def ours(mode, table, log_probs, rows=None, **changed):
    """Loss, metrics and the gradient of the log-probs (a numpy array of these rows' tokens)."""
    leaf = torch.from_numpy(log_probs).clone().requires_grad_()
    batch = tensors_of(table, rows)
    loss, metrics = policy_loss(
        {"log_probs": leaf},
        batch,
        token_loss=resolve(mode).load(),
        settings=settings_of(mode, **changed),
        num_tokens=int((np.concatenate(table["response_mask"].to_pylist()) > 0).sum()) or 1,
    )
    loss.backward()
    return loss.item(), {name: value.item() for name, value in metrics.items()}, leaf.grad.numpy()


def by_definition(mode, table, log_probs, frozen) -> float:
    """The mean over responses of the mean over the tokens that the policy wrote of the paper's loss."""
    total, sequences, start = 0.0, 0, 0
    for row in table.to_pylist():
        written = [t for t, m in enumerate(row["response_mask"]) if m]
        new, stopped = ([float(column[start + t]) for t in written] for column in (log_probs, frozen))
        old, advantages = ([row[name][t] for t in written] for name in ("old_log_probs", "advantages"))
        selected = [row["selected"][t] for t in written] if "selected" in row else [0] * len(written)
        if written:
            total += sum(NAIVE[mode](new, stopped, old, advantages, selected)) / len(written)
            sequences += 1
        start += len(row["response_mask"])
    return total / max(sequences, 1)


def test_every_loss_has_its_reference_here():
    assert set(NAIVE) == set(LOSS_MODES)


@each_loss
@given(mask_rows=masks, seed=st.integers(0, 999))
def test_losses_are_those_of_a_loop_over_the_papers_formula(mode, mask_rows, seed):
    table = mini_batch(mode, mask_rows, seed)
    log_probs = moved(table, seed)
    loss, _, _ = ours(mode, table, log_probs)
    assert loss == pytest.approx(by_definition(mode, table, log_probs, log_probs), rel=1e-5, abs=1e-6)


@each_loss
@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_the_papers_formula(mode, seed):
    table = mini_batch(mode, MASKS, seed)
    log_probs, step = moved(table, seed), 1e-6
    _, _, gradient = ours(mode, table, log_probs)
    for token in range(len(log_probs)):
        nudge = np.zeros(len(log_probs))
        nudge[token] = step
        higher, lower = (by_definition(mode, table, log_probs + sign * nudge, log_probs) for sign in (1, -1))
        assert gradient[token] == pytest.approx((higher - lower) / (2 * step), rel=1e-4, abs=1e-6)


@each_loss
@given(mask_rows=masks, seed=st.integers(0, 99), groups=st.lists(st.integers(0, 2), min_size=6, max_size=6))
def test_loss_metrics_and_gradient_add_up_over_any_split_of_the_rows(mode, mask_rows, seed, groups):
    """The rows of a mini-batch, dealt over micro-batches (or ranks) in any way."""
    table = mini_batch(mode, mask_rows, seed)
    log_probs = Ragged.from_rows(table["response_mask"].to_pylist(), np.int8).like(moved(table, seed))
    loss, metrics, gradient = ours(mode, table, log_probs.values)
    total, sums, parts = 0.0, dict.fromkeys(metrics, 0.0), {}
    for micro in range(3):
        rows = [row for row in range(len(table)) if groups[row] == micro]
        if rows:
            part = np.concatenate([log_probs[row] for row in rows])
            part_loss, part_metrics, part_gradient = ours(mode, table, part, rows)
            total += part_loss
            sums = {name: sums[name] + part_metrics[name] for name in sums}
            lengths = np.cumsum([len(log_probs[row]) for row in rows])[:-1]
            parts |= dict(zip(rows, np.split(part_gradient, lengths), strict=True))
    assert total == pytest.approx(loss, rel=1e-9, abs=1e-9)
    assert sums == pytest.approx(metrics, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(np.concatenate([parts[row] for row in range(len(table))]), gradient, rtol=1e-9)


@each_loss
@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_tokens_that_are_masked_out_contribute_nothing_whatever_they_hold(mode, junk):
    table = mini_batch(mode, MASKS)
    log_probs = moved(table, 0)
    mask = np.concatenate(table["response_mask"].to_pylist()) > 0
    dirty = table
    for name in ("advantages", "old_log_probs", "loss_weights"):
        column = Ragged.from_column(table[name])
        dirty = with_columns(dirty, **{name: column.like(np.where(mask, column.values, junk).astype(np.float32))})
    clean = ours(mode, table, log_probs)
    filled = ours(mode, dirty, np.where(mask, log_probs, junk))
    assert filled[:2] == clean[:2]
    np.testing.assert_array_equal(filled[2], np.where(mask, clean[2], 0.0))


@each_loss
def test_ratios_that_would_explode_are_cut(mode):
    table = mini_batch(mode, [[1, 1], [1, 1]])
    for far in (-300.0, 300.0):
        loss, _, gradient = ours(mode, table, moved(table, 0) + far)
        assert math.isfinite(loss)
        assert np.isfinite(gradient).all()


@each_loss
def test_on_the_policy_that_drew_the_tokens_every_gradient_is_the_policy_gradient(mode):
    table = mini_batch(mode, MASKS)
    table = table.drop_columns([name for name in ("selected",) if name in table.column_names])
    if LOSS_MODES[mode].select:
        mask = Ragged.from_column(table["response_mask"])
        table = with_columns(table, selected=mask.like(np.zeros(len(mask.values), np.int8)))
    columns = tensors_of(table)
    _, _, gradient = ours(mode, table, columns["old_log_probs"].numpy())
    expected = -columns["loss_weights"] * columns["advantages"]
    np.testing.assert_allclose(gradient, expected.numpy(), rtol=1e-6, atol=1e-9)


# ---- tokens that the covariance losses select


@given(masks, st.integers(0, 99))
def test_kl_cov_selects_the_highest_covariances_of_the_mini_batch(mask_rows, seed):
    table = mini_batch("kl_cov", mask_rows, seed)
    tokens = [
        (row, t, r["advantages"][t], r["old_log_probs"][t])
        for row, r in enumerate(table.to_pylist())
        for t, m in enumerate(r["response_mask"])
        if m
    ]
    if not tokens:
        return
    mean_a, mean_p = (sum(token[i] for token in tokens) / len(tokens) for i in (2, 3))
    by_covariance = sorted(tokens, key=lambda token: -(token[2] - mean_a) * (token[3] - mean_p))
    wanted = {token[:2] for token in by_covariance[: max(1, int(0.2 * len(tokens)))]}
    selected = table["selected"].to_pylist()
    assert {(row, t) for row, flags in enumerate(selected) for t, flag in enumerate(flags) if flag} == wanted


@given(masks, st.integers(0, 99))
def test_clip_cov_selects_a_share_of_those_within_its_bounds(mask_rows, seed):
    table = mini_batch("clip_cov", mask_rows, seed)
    columns = {name: np.concatenate(table[name].to_pylist()) for name in table.column_names}
    written = columns["response_mask"] > 0
    found = covariances(columns["advantages"][written], columns["old_log_probs"][written])
    within = (found > 0.1) & (found < 2.0)
    chosen = columns["selected"][written] > 0
    assert not columns["selected"][~written].any()
    assert not (chosen & ~within).any()
    assert chosen.sum() == min(max(1, int(0.2 * written.sum())), within.sum())


def test_clip_covs_choice_is_a_function_of_the_seed():
    table, settings = mini_batch("clip_cov", [[1] * 6] * 50), settings_of("clip_cov")
    again, other = (selected_tokens(table, settings, (seed,))["selected"].values for seed in (0, 1))
    np.testing.assert_array_equal(again, np.concatenate(table["selected"].to_pylist()))
    assert (again != other).any()


def test_only_losses_that_select_tokens_get_a_column_for_it():
    with_one = {mode for mode in LOSS_MODES if "selected" in mini_batch(mode, MASKS).column_names}
    assert with_one == {"clip_cov", "kl_cov"}


def test_entropy_falls_slower_where_high_covariances_learn_nothing():
    """On softmax policies of one step, the paper's point: entropy's change is minus the covariance."""
    torch.manual_seed(0)
    logits = torch.randn(64, 10) * 2
    drawn = torch.multinomial(logits.softmax(-1), 1)[:, 0]
    advantages = torch.randn(64)

    def entropy_after(mode, ratio):
        leaf = logits.clone().requires_grad_()
        log_probs = leaf.log_softmax(-1)[torch.arange(64), drawn]
        mask = Ragged(np.ones(64, np.int8), np.arange(65))
        table = pa.table({"response_mask": mask.to_column()})
        old = mask.like(log_probs.detach().numpy())
        table = with_columns(table, advantages=mask.like(advantages.numpy()), old_log_probs=old)
        wide = PolicyLossConfig(loss_mode=mode, clip_cov_ratio=ratio, clip_cov_lb=0.5, clip_cov_ub=99)
        settings = SETTINGS.model_copy(update={"policy_loss": wide})
        table = with_columns(table, **loss_columns(table, settings, 1, (0,)))
        token_loss = partial(policy_loss, token_loss=resolve(mode).load(), settings=settings, num_tokens=64)
        batch = {name: tensor.float() for name, tensor in tensors_of(table).items()}
        token_loss({"log_probs": log_probs}, batch)[0].backward()
        after = (leaf - 10 * leaf.grad).detach().log_softmax(-1)
        return -(after.exp() * after).sum(-1).mean().item()

    assert entropy_after("clip_cov", 1.0) > entropy_after("vanilla", 0.0)


# ---- aggregation and the registry


@pytest.mark.parametrize("mode", OF_RESPONSES)
def test_sequence_losses_averaged_over_tokens_weigh_responses_by_their_length(mode):
    table = mini_batch(mode, [[1, 1, 1], [1]], loss_agg_mode="token-mean")
    log_probs = moved(table, 0)
    mask = Ragged.from_rows([[1, 1, 1], [1]], np.int8)
    np.testing.assert_array_equal(tensors_of(table)["loss_weights"], aggregation_weights(mask, "token-mean", 8).values)
    one, two = (
        by_definition(mode, table.slice(row, 1), log_probs[span], log_probs[span])
        for row, span in enumerate((slice(0, 3), slice(3, 4)))
    )
    assert ours(mode, table, log_probs)[0] == pytest.approx((3 * one + two) / 4, rel=1e-5)


def test_a_loss_of_the_users_own_is_found_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "def squared(tokens, settings):\n"
        "    return tokens.log_ratio.square() * settings.clip_ratio_c, {'actor/far': tokens.log_ratio.abs() > 0.1}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table = mini_batch("vanilla", MASKS)
    log_probs = moved(table, 0)
    loss, metrics, _ = ours("my_losses:squared", table, log_probs)
    columns = tensors_of(table)
    distance = (torch.from_numpy(log_probs) - columns["old_log_probs"]) * (columns["response_mask"] > 0)
    assert loss == pytest.approx((columns["loss_weights"] * 3 * distance**2).sum().item())
    written = columns["response_mask"].sum()
    assert metrics["actor/far"] == pytest.approx(((distance.abs() > 0.1).sum() / written).item())


@pytest.mark.parametrize(
    ("name", "says"),
    [("gsop", "Did you mean gspo"), ("no_such_package_here:f", "no_such_package_here"), ("math:pi", "not a function")],
)
def test_a_loss_that_cannot_be_found_is_an_error_naming_the_key(name, says):
    with pytest.raises(UserError, match=says) as error:
        resolve(name)
    assert f"actor_rollout_ref.actor.policy_loss.loss_mode={name}" in str(error.value)
