"""Advantage estimators against loops written from the papers' formulas."""

import math
import statistics
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verl.algorithms.advantages import ESTIMATORS, AdvantageInputs, resolve
from verl.data.ragged import Ragged
from verl.errors import UserError

finite = st.floats(-5, 5, width=32)
unit = st.floats(0, 1)
flag = st.booleans()


@st.composite
def inputs(draw, gamma=unit, lam=unit, normalise=flag):
    """A few rows of 0-6 tokens, some masked out, with garbage in the masked tokens' columns."""
    masks = draw(st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=5))
    junk = st.sampled_from([math.nan, math.inf, 3.0])
    columns = [[[draw(finite if m else junk) for m in mask] for mask in masks] for _ in range(2)]
    return AdvantageInputs(
        *(rows(column) for column in columns),
        response_mask=rows(masks, np.int8),
        group=np.array(draw(st.lists(st.integers(0, 2), min_size=len(masks), max_size=len(masks))), np.int64),
        settings=algorithm(draw(gamma), draw(lam), draw(normalise)),
        greedy_rewards=np.array([draw(finite) for _ in masks], np.float64),
    )


def rows(lists, dtype=np.float32) -> Ragged:
    return Ragged.from_rows([np.array(row, dtype) for row in lists], dtype)


def algorithm(gamma=1.0, lam=1.0, normalise=True):
    return SimpleNamespace(gamma=gamma, lam=lam, norm_adv_by_std_in_grpo=normalise)


def gae_by_definition(x: AdvantageInputs):
    """Per row, at the tokens written: equation 16 of the GAE paper, a sum over the future, and A + V."""
    gamma, lam = x.settings.gamma, x.settings.lam
    all_advantages, all_returns = [], []
    for b in range(len(x.response_mask)):
        steps = [t for t, m in enumerate(x.response_mask[b]) if m]
        r = [float(x.token_rewards[b][t]) for t in steps]
        v = [float(x.values[b][t]) for t in steps] + [0.0]
        delta = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(r))]
        future = [
            math.fsum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(delta))) for i in range(len(delta))
        ]
        all_advantages += future
        all_returns += [a + v[i] for i, a in enumerate(future)]
    return all_advantages, all_returns


@given(inputs())
def test_gae_is_the_papers_sum_over_the_tokens_that_the_policy_wrote(x):
    advantages, returns = ESTIMATORS["gae"](x)
    raw, expected_returns = gae_by_definition(x)
    written = x.response_mask.values > 0

    np.testing.assert_allclose(returns.values[written], expected_returns, rtol=1e-5, atol=1e-5)
    if len(raw) > 1:
        mean, variance = statistics.fmean(raw), statistics.variance(raw)
        expected = [(a - mean) / math.sqrt(variance + 1e-8) for a in raw]
        np.testing.assert_allclose(advantages.values[written], expected, rtol=1e-4, atol=1e-4)
    assert advantages.values.dtype == returns.values.dtype == np.float32
    assert not advantages.values[~written].any()
    assert not returns.values[~written].any()


@given(inputs(lam=st.just(1.0)))
def test_gae_with_lambda_one_has_the_discounted_rewards_as_returns(x):
    _, returns = ESTIMATORS["gae"](x)
    for b in range(len(x.response_mask)):
        kept = x.response_mask[b] > 0
        r = x.token_rewards[b][kept].astype(float)
        expected = [sum(x.settings.gamma**j * r[i + j] for j in range(len(r) - i)) for i in range(len(r))]
        np.testing.assert_allclose(returns[b][kept], expected, rtol=1e-5, atol=1e-5)


@given(inputs(lam=st.just(0.0)))
def test_gae_with_lambda_zero_has_one_step_targets_as_returns(x):
    _, returns = ESTIMATORS["gae"](x)
    for b in range(len(x.response_mask)):
        kept = x.response_mask[b] > 0
        r, v = x.token_rewards[b][kept].astype(float), x.values[b][kept].astype(float)
        expected = r + x.settings.gamma * np.append(v, 0.0)[1:] if len(r) else r
        np.testing.assert_allclose(returns[b][kept], expected, rtol=1e-5, atol=1e-5)


def test_gae_worked_by_hand():
    """Two tokens, gamma 1, lam 0.5, reward 1 at the end: deltas 0.1 and 0.4, advantages 0.3 and 0.4."""
    x = AdvantageInputs(
        rows([[0, 1]]), rows([[0.5, 0.6]]), rows([[1, 1]], np.int8), np.zeros(1, np.int64), algorithm(lam=0.5)
    )
    advantages, returns = ESTIMATORS["gae"](x)
    np.testing.assert_allclose(returns.values, [0.8, 1.0], rtol=1e-6)
    np.testing.assert_allclose(advantages.values, [-math.sqrt(0.5), math.sqrt(0.5)], rtol=1e-4)


@given(inputs())
def test_gae_of_a_row_with_a_tools_output_is_that_of_the_row_without_it(x):
    def squeezed(column):
        return Ragged.from_rows([column[b][x.response_mask[b] > 0] for b in range(len(column))], column.values.dtype)

    short = AdvantageInputs(
        squeezed(x.token_rewards), squeezed(x.values), squeezed(x.response_mask), x.group, x.settings
    )
    written = x.response_mask.values > 0
    for long_column, short_column in zip(ESTIMATORS["gae"](x), ESTIMATORS["gae"](short), strict=True):
        np.testing.assert_array_equal(long_column.values[written], short_column.values)


def test_whitened_advantages_have_mean_zero_and_unbiased_variance_one_over_the_whole_batch():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 50, 64)
    mask = Ragged.from_rows([rng.integers(0, 2, n).astype(np.int8) for n in lengths], np.int8)
    x = AdvantageInputs(
        mask.like(rng.normal(3, 2, len(mask.values))),
        mask.like(rng.normal(1, 1, len(mask.values))),
        mask,
        np.zeros(64, np.int64),
        algorithm(0.99, 0.95),
    )
    written = ESTIMATORS["gae"](x)[0].values[mask.values > 0].astype(float)
    assert written.mean() == pytest.approx(0, abs=1e-6)
    assert written.var(ddof=1) == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_batch_of_empty_responses_has_empty_advantages(name):
    empty = rows([[], []])
    x = AdvantageInputs(empty, empty, rows([[], []], np.int8), np.array([0, 0]), algorithm(), np.zeros(2))
    advantages, returns = ESTIMATORS[name](x)
    assert len(advantages) == len(returns) == 2
    assert len(advantages.values) == 0


def test_a_single_token_batch_has_a_finite_advantage():
    x = AdvantageInputs(rows([[2.0]]), rows([[1.0]]), rows([[1]], np.int8), np.array([0]), algorithm())
    advantages, returns = ESTIMATORS["gae"](x)
    assert advantages.values.tolist() == [0.0]
    assert returns.values.tolist() == [2.0]


def test_gae_without_values_says_what_to_do():
    x = AdvantageInputs(rows([[1.0]]), None, rows([[1]], np.int8), np.array([0]), algorithm())
    with pytest.raises(UserError, match="grpo"):
        ESTIMATORS["gae"](x)


# ---- GRPO


def grpo_by_definition(x: AdvantageInputs):
    rewards = [
        math.fsum(float(r) for r, m in zip(x.token_rewards[b], x.response_mask[b], strict=True) if m)
        for b in range(len(x.group))
    ]
    advantages = []
    for reward, group in zip(rewards, x.group, strict=True):
        peers = [r for r, g in zip(rewards, x.group, strict=True) if g == group]
        mean, std = (statistics.fmean(peers), statistics.stdev(peers)) if len(peers) > 1 else (0.0, 1.0)
        advantages.append((reward - mean) / (std + 1e-6) if x.settings.norm_adv_by_std_in_grpo else reward - mean)
    return advantages


@given(inputs())
def test_grpo_is_the_reward_standardised_in_its_group(x):
    advantages, returns = ESTIMATORS["grpo"](x)
    for b, expected in enumerate(grpo_by_definition(x)):
        # A spread near the floats' own rounding makes the quotient arbitrary: compare to what rounding allows.
        np.testing.assert_allclose(advantages[b], np.where(x.response_mask[b] > 0, expected, 0.0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(returns.values, advantages.values)


def grouped(rewards_of_groups, normalise=True):
    """One token a response, so that rewards are given directly."""
    group = np.repeat(np.arange(len(rewards_of_groups)), [len(g) for g in rewards_of_groups])
    rewards = [[r] for g in rewards_of_groups for r in g]
    mask = rows([[1]] * len(rewards), np.int8)
    return AdvantageInputs(rows(rewards, np.float64), None, mask, group, algorithm(normalise=normalise))


reward_groups = st.lists(st.lists(st.integers(-10, 10), min_size=2, max_size=5), min_size=1, max_size=4)


@given(reward_groups, st.integers(-100, 100), st.integers(1, 50))
def test_grpo_does_not_change_when_rewards_are_shifted_and_scaled(groups, shift, scale):
    before = ESTIMATORS["grpo"](grouped(groups))[0].values
    after = ESTIMATORS["grpo"](grouped([[shift + scale * r for r in g] for g in groups]))[0].values
    np.testing.assert_allclose(after, before, atol=1e-4)


@given(reward_groups, st.booleans())
def test_grpo_advantages_of_a_group_sum_to_zero(groups, normalise):
    x = grouped(groups, normalise)
    sums = np.bincount(x.group, weights=ESTIMATORS["grpo"](x)[0].values)
    np.testing.assert_allclose(sums, 0, atol=1e-4)


@given(reward_groups, st.randoms(use_true_random=False))
def test_grpo_does_not_depend_on_where_a_groups_rows_stand(groups, random):
    x = grouped(groups)
    order = list(range(len(x.group)))
    random.shuffle(order)
    shuffled = AdvantageInputs(
        rows([x.token_rewards[b] for b in order], np.float64), None, x.response_mask, x.group[order], x.settings
    )
    np.testing.assert_allclose(
        ESTIMATORS["grpo"](shuffled)[0].values, ESTIMATORS["grpo"](x)[0].values[order], atol=1e-6
    )


def test_grpo_worked_by_hand():
    """Rewards 1, 0, 0, 1: mean 0.5, unbiased std sqrt(1/3)."""
    advantages, _ = ESTIMATORS["grpo"](grouped([[1, 0, 0, 1]]))
    np.testing.assert_allclose(advantages.values, np.array([1, -1, -1, 1]) * 0.5 * math.sqrt(3), rtol=1e-5)


# ---- others without a critic, each against a loop over its paper's formula


def rewards_of(x: AdvantageInputs) -> list[float]:
    return [
        math.fsum(float(r) for r, m in zip(x.token_rewards[b], x.response_mask[b], strict=True) if m)
        for b in range(len(x.group))
    ]


def peers_of(x: AdvantageInputs, b: int) -> list[int]:
    """The rows of b's group, b among them."""
    return [other for other in range(len(x.group)) if x.group[other] == x.group[b]]


def rloo_by_definition(x: AdvantageInputs, b: int, rewards: list[float]) -> float:
    others = [rewards[other] for other in peers_of(x, b) if other != b]
    return rewards[b] - (sum(others) / len(others) if others else 0.0)


def opo_by_definition(x: AdvantageInputs, b: int, rewards: list[float]) -> float:
    peers = peers_of(x, b)
    lengths = {peer: int(sum(x.response_mask[peer])) for peer in peers}
    if len(peers) == 1 or not sum(lengths.values()):
        return rewards[b]
    return rewards[b] - sum(lengths[peer] * rewards[peer] for peer in peers) / sum(lengths.values())


def grpo_passk_by_definition(x: AdvantageInputs, b: int, rewards: list[float]) -> float:
    """The group's maximum less what it would be without b (Tang et al., leave-one-out), over the group's std."""
    others = [rewards[other] for other in peers_of(x, b) if other != b]
    if not others:
        return rewards[b] / (1 + 1e-6) if x.settings.norm_adv_by_std_in_grpo else rewards[b]
    added = max([rewards[b], *others]) - max(others)
    scale = statistics.stdev([rewards[b], *others]) + 1e-6 if x.settings.norm_adv_by_std_in_grpo else 1.0
    return added / scale


def gpg_by_definition(x: AdvantageInputs, b: int, rewards: list[float]) -> float:
    def without_gradient(row):
        of_peers = {rewards[peer] for peer in peers_of(x, row)}
        return of_peers == {0.0} if len(peers_of(x, row)) == 1 else len(of_peers) == 1

    batch = len(rewards)
    empty = sum(without_gradient(row) for row in range(batch))
    alpha = batch / (batch - empty) if batch > empty else 0.0
    peers = peers_of(x, b)
    mean = sum(rewards[peer] for peer in peers) / len(peers) if len(peers) > 1 else 0.0
    return alpha * (rewards[b] - mean)


BY_DEFINITION = {
    "rloo": rloo_by_definition,
    "opo": opo_by_definition,
    "grpo_passk": grpo_passk_by_definition,
    "gpg": gpg_by_definition,
}


@pytest.mark.parametrize("name", BY_DEFINITION)
@given(x=inputs())
def test_estimators_of_a_group_are_their_papers_formulas(name, x):
    advantages, returns = ESTIMATORS[name](x)
    rewards = rewards_of(x)
    for b in range(len(rewards)):
        expected = BY_DEFINITION[name](x, b, rewards)
        np.testing.assert_allclose(advantages[b], np.where(x.response_mask[b] > 0, expected, 0.0), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(returns.values, advantages.values)
    assert advantages.values.dtype == np.float32


def whitened(values: list[float]) -> list[float]:
    mean, variance = statistics.fmean(values), statistics.variance(values) if len(values) > 1 else 0.0
    return [(value - mean) / math.sqrt(variance + 1e-8) for value in values]


@given(inputs())
def test_reinforce_plus_plus_whitens_the_discounted_rewards_to_come(x):
    gamma, expected = x.settings.gamma, []
    for b in range(len(x.response_mask)):
        r = [float(r) for r, m in zip(x.token_rewards[b], x.response_mask[b], strict=True) if m]
        expected += [math.fsum(gamma ** (j - i) * r[j] for j in range(i, len(r))) for i in range(len(r))]
    advantages, returns = ESTIMATORS["reinforce_plus_plus"](x)
    written = x.response_mask.values > 0
    np.testing.assert_allclose(returns.values[written], expected, rtol=1e-5, atol=1e-5)
    if expected:
        np.testing.assert_allclose(advantages.values[written], whitened(expected), rtol=1e-4, atol=1e-3)
    assert not advantages.values[~written].any()


@given(inputs())
def test_reinforce_plus_plus_baseline_whitens_what_is_over_the_groups_mean(x):
    rewards, expected = rewards_of(x), []
    for b in range(len(rewards)):
        peers = peers_of(x, b)
        mean = sum(rewards[peer] for peer in peers) / len(peers) if len(peers) > 1 else 0.0
        expected += [rewards[b] - mean] * int(sum(x.response_mask[b]))
    advantages, _ = ESTIMATORS["reinforce_plus_plus_baseline"](x)
    written = x.response_mask.values > 0
    if expected:
        np.testing.assert_allclose(advantages.values[written], whitened(expected), rtol=1e-4, atol=1e-3)
    assert not advantages.values[~written].any()


@given(inputs())
def test_remax_takes_the_greedy_reward_off_the_rewards_to_come(x):
    advantages, returns = ESTIMATORS["remax"](x)
    for b in range(len(x.response_mask)):
        steps = [t for t, m in enumerate(x.response_mask[b]) if m]
        for i, t in enumerate(steps):
            to_come = math.fsum(float(x.token_rewards[b][later]) for later in steps[i:])
            assert returns[b][t] == pytest.approx(to_come, rel=1e-5, abs=1e-5)
            assert advantages[b][t] == pytest.approx(to_come - x.greedy_rewards[b], rel=1e-5, abs=1e-5)
    assert not advantages.values[x.response_mask.values == 0].any()


def test_remax_without_greedy_rewards_says_so():
    with pytest.raises(UserError, match="greedy"):
        ESTIMATORS["remax"](grouped([[1.0]]))


@pytest.mark.parametrize(
    ("name", "rewards", "expected"),
    [
        ("rloo", [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        ("opo", [1, 0], [0.5, -0.5]),  # equal lengths: the mean
        ("grpo_passk", [1, 0, 0, 0], [1 / 0.5, 0, 0, 0]),
        ("grpo_passk", [1, 1, 0, 0], [0, 0, 0, 0]),  # a second one is as good: neither adds anything
        ("gpg", [1, 0], [0.5, -0.5]),
    ],
)
def test_worked_by_hand(name, rewards, expected):
    np.testing.assert_allclose(ESTIMATORS[name](grouped([rewards]))[0].values, expected, rtol=1e-5)


def test_opos_baseline_weighs_responses_by_their_length():
    """Lengths 1 and 3, rewards 1 and 0: the baseline is 1/4."""
    mask = rows([[1], [1, 1, 1]], np.int8)
    x = AdvantageInputs(rows([[1.0], [0, 0, 0]]), None, mask, np.zeros(2, np.int64), algorithm())
    np.testing.assert_allclose(ESTIMATORS["opo"](x)[0].values, [0.75, -0.25, -0.25, -0.25])


def test_gpg_worked_by_hand():
    """Eight responses, two of them in a group that is all right and two in one that is all wrong: B / (B - M) = 2,
    however many of the others are right."""
    advantages, _ = ESTIMATORS["gpg"](grouped([[1, 1], [0, 0], [1, 0], [0, 1]]))
    np.testing.assert_allclose(advantages.values, [0, 0, 0, 0, 1, -1, -1, 1])
    advantages, _ = ESTIMATORS["gpg"](grouped([[1, 1, 1, 1], [1, 1, 1, 0]]))
    np.testing.assert_allclose(advantages.values, [0, 0, 0, 0, 0.5, 0.5, 0.5, -1.5])


def test_gpg_gives_back_what_groups_of_equal_rewards_take_from_the_mean():
    alone, diluted = grouped([[1, 0]]), grouped([[1, 0], [1, 1], [0, 0], [0, 0]])
    expected = ESTIMATORS["gpg"](alone)[0].values
    np.testing.assert_allclose(ESTIMATORS["gpg"](diluted)[0].values[:2], 4 * expected)


OF_GROUPS = [name for name, estimator in ESTIMATORS.items() if estimator.compares_group]
UNSCALED = [name for name in OF_GROUPS if name != "reinforce_plus_plus_baseline"]


@pytest.mark.parametrize("name", OF_GROUPS)
def test_groups_of_equal_rewards_have_no_advantage_and_no_nan(name):
    advantages, _ = ESTIMATORS[name](grouped([[0.1] * 3, [0.7] * 5]))
    np.testing.assert_allclose(advantages.values, 0, atol=1e-9)


@pytest.mark.parametrize("name", UNSCALED)
def test_a_group_of_one_has_its_reward_as_advantage(name):
    for normalise in (True, False):
        advantages, _ = ESTIMATORS[name](grouped([[2.5], [-1.0]], normalise))
        np.testing.assert_allclose(advantages.values, [2.5, -1.0], rtol=2e-6)


@pytest.mark.parametrize("name", UNSCALED)
@given(groups=reward_groups, shift=st.integers(-100, 100))
def test_a_shift_of_a_groups_rewards_changes_nothing(name, groups, shift):
    before = ESTIMATORS[name](grouped(groups))[0].values
    after = ESTIMATORS[name](grouped([[shift + r for r in g] for g in groups]))[0].values
    np.testing.assert_allclose(after, before, atol=1e-4)


# ---- the registry


def test_an_estimator_of_the_users_own_is_found_by_import_path(tmp_path, monkeypatch):
    (tmp_path / "own_estimators.py").write_text(
        "import numpy as np\n"
        "def constant(inputs):\n"
        "    ones = inputs.response_mask.like(np.ones(len(inputs.response_mask.values), np.float32))\n"
        "    return ones, ones\n"
        "constant.needs_critic = True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    estimator = resolve("own_estimators:constant")
    assert estimator.needs_critic
    assert estimator(grouped([[1, 2]]))[0].values.tolist() == [1.0, 1.0]


def test_the_registry_knows_what_estimators_need():
    assert [name for name in ESTIMATORS if resolve(name).needs_critic] == ["gae"]
    assert [name for name in ESTIMATORS if resolve(name).needs_greedy] == ["remax"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("grop", "Did you mean grpo"),
        ("no_such_package_here:f", "no_such_package_here"),
        ("math:no_such_function", "no_such_function"),
        ("math:pi", "not a function"),
        (":f", "package.module:function"),
    ],
)
def test_an_estimator_that_cannot_be_found_is_an_error_naming_the_key(name, says):
    with pytest.raises(UserError, match=says) as error:
        resolve(name)
    assert f"algorithm.adv_estimator={name}" in str(error.value)


def test_an_estimator_that_returns_rows_of_other_lengths_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "crooked_algorithms.py").write_text(
        "from verl.data.ragged import Ragged\n"
        "def one_row(inputs):\n"
        "    column = Ragged(inputs.token_rewards.values, inputs.token_rewards.offsets[[0, -1]])\n"
        "    return column, column\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="not aligned"):
        resolve("crooked_algorithms:one_row")(grouped([[1, 2]]))


@settings(max_examples=20)
@given(inputs())
def test_estimators_leave_their_inputs_as_they_were(x):
    before = [column.values.copy() for column in (x.token_rewards, x.values, x.response_mask)]
    greedy = x.greedy_rewards.copy()
    for estimator in ESTIMATORS.values():
        estimator(x)
    for column, values in zip((x.token_rewards, x.values, x.response_mask), before, strict=True):
        np.testing.assert_array_equal(column.values, values)
    np.testing.assert_array_equal(x.greedy_rewards, greedy)
