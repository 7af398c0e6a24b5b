"""The log-prob check on models small enough to draw from many times: what is right passes, what is wrong is named."""

import itertools
import math
import re

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.checks.log_probs import (
    DRAWN_FACTORS,
    DRAWN_LIMIT,
    FLOAT32_LIMIT,
    HALF_LIMIT,
    Scores,
    check_log_probs,
    check_sampling,
    diagnose,
    diagnose_draws,
    rounding_limit,
)
from verl.config.loading.load import load
from verl.data.ragged import Ragged
from verl.data.schema import COLUMNS, with_columns
from verl.errors import UserError
from verl.rollout.contract.base import SamplingParams

VOCABULARY, ROWS, LENGTH = 50, 8, 32
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
LIMITS = {FLOAT32: FLOAT32_LIMIT, BFLOAT16: HALF_LIMIT}
each_dtype = pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=["float32", "bfloat16"])


class Model(torch.nn.Module):
    """The next token's logits from the two before it. scale: of the logits; at 0.2 nearly flat, at 8 nearly certain."""

    def __init__(self, seed=0, scale=2.0, dtype=FLOAT32):
        super().__init__()
        torch.manual_seed(seed)
        self.scale = scale
        self.embed = torch.nn.Embedding(VOCABULARY, 64)
        layers = [(torch.nn.Linear(128, 128), torch.nn.Tanh()) for _ in range(3)]
        self.body = torch.nn.Sequential(*itertools.chain(*layers))
        self.head = torch.nn.Linear(128, VOCABULARY)
        torch.nn.init.normal_(self.head.weight, std=0.1)
        self.to(dtype)

    @torch.no_grad()
    def forward(self, ids_BT):
        pairs_BT = torch.cat([self.embed(ids_BT[:, :-1]), self.embed(ids_BT[:, 1:])], -1)
        return (self.head(self.body(pairs_BT)) * self.scale).float()


def draw(model, temperature=1.0, seed=0):
    """Token ids, two of a prompt first."""
    noise = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (ROWS, 2), generator=noise)
    for _ in range(LENGTH):
        logits = model(ids)[:, -1]
        if temperature:
            token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=noise)
        else:
            token = logits.argmax(-1, keepdim=True)
        ids = torch.cat([ids, token], 1)
    return ids


def scores(model, ids, temperature=1.0, one_by_one=False):
    """one_by_one: as an engine computes, position after position."""
    if one_by_one:
        steps = [model(ids[:, step : step + 2]) for step in range(LENGTH)]
        logits = torch.cat(steps, 1)
    else:
        logits = model(ids)[:, :-1]
    log_probs = (logits / temperature).log_softmax(-1)
    entropy = -(log_probs.exp() * log_probs).sum(-1)
    chosen = log_probs.gather(-1, ids[:, 2:, None])[..., 0]
    return Scores(*(values.flatten().double().numpy() for values in (chosen, entropy)))


def trainer_at(model, ids):
    return lambda temperature: scores(model, ids, temperature)


def engine_log_probs(model, ids, temperature):
    return scores(model, ids, temperature, one_by_one=True).log_probs


def diagnosed(engine, trainer, *, said, configured, dtype, drawn=None, seed=0):
    """Of an engine whose log-probs are of temperature ``said``."""
    ids = draw(engine, said if drawn is None else drawn, seed)
    rollout = engine_log_probs(engine, ids, said)
    return diagnose(rollout, trainer_at(trainer, ids), configured, limit=LIMITS[dtype])


# ---- the log-probs


@each_dtype
@pytest.mark.parametrize("scale", [0.2, 2.0, 8.0, 40.0])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_the_same_distribution_passes(dtype, scale, temperature):
    for seed in range(3):
        engine, trainer = Model(seed, scale, dtype), Model(seed, scale)
        found = diagnosed(engine, trainer, said=temperature, configured=temperature, dtype=dtype, seed=seed)
        assert found is None


@each_dtype
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize(
    ("configured", "said"), [(1.0, 0.9), (0.9, 1.0), (0.7, 1.0), (1.0, 0.5), (1.3, 0.6), (1.0, 1.7), (1.0, 0.73)]
)
def test_another_temperature_is_named(dtype, scale, configured, said):
    for seed in range(2):
        engine, trainer = Model(seed, scale, dtype), Model(seed, scale)
        found = diagnosed(engine, trainer, said=said, configured=configured, dtype=dtype, seed=seed)
        (temperature,) = re.findall(r"engine's log-probs are of temperature ([0-9.]+),", found)
        assert float(temperature) == pytest.approx(said, rel=0.04)
        assert f"actor_rollout_ref.rollout.temperature={configured:g}" in found


@each_dtype
@pytest.mark.parametrize("scale", [1.0, 8.0])
@pytest.mark.parametrize("configured", [0.7, 1.0])
def test_other_weights_are_named(dtype, scale, configured):
    for seed in range(3):
        engine, trainer = Model(seed, scale, dtype), Model(seed + 100, scale)
        found = diagnosed(engine, trainer, said=configured, configured=configured, dtype=dtype, seed=seed)
        assert "other weights than the trainer" in found


@each_dtype
def test_a_single_tensor_that_was_not_sent_is_noticed(dtype):
    engine, trainer = Model(0, dtype=dtype), Model(0)
    with torch.no_grad():
        engine.body[2].weight.copy_(torch.randn(128, 128) * 0.05)
    found = diagnosed(engine, trainer, said=1.0, configured=1.0, dtype=dtype)
    assert "other weights than the trainer" in found


@pytest.mark.parametrize("owner", ["engine", "trainer"])
@pytest.mark.parametrize("wrong", [math.nan, -math.inf, math.inf, 0.5])
def test_what_is_no_log_prob_is_named_with_its_owner(owner, wrong):
    model = Model()
    ids = draw(model)
    right = engine_log_probs(model, ids, 1.0)
    broken = right.copy()
    broken[[3, 70]] = wrong
    rollout, trainer = (broken, right) if owner == "engine" else (right, broken)
    found = diagnose(rollout, lambda _: Scores(trainer, np.zeros(len(right))), 1.0, limit=HALF_LIMIT)
    assert f"2 of 256 log-probs of the {owner} are not log-probs" in found


def test_where_all_is_well_the_trainer_is_asked_once():
    model = Model()
    ids = draw(model)
    asked = []

    def at(temperature):
        asked.append(temperature)
        return scores(model, ids, temperature)

    assert diagnose(engine_log_probs(model, ids, 1.0), at, 1.0, limit=HALF_LIMIT) is None
    assert asked == [1.0]


@given(st.integers(0, 99), st.floats(0.3, 3))
def test_a_log_probs_derivative_by_inverse_temperature_is_itself_and_the_entropy(seed, temperature):
    rng = np.random.default_rng(seed)
    logits, tokens, step = rng.normal(size=(20, 10)), rng.integers(10, size=20), 1e-5
    here, hotter, colder = (
        numpy_scores(logits, tokens, temperature / factor) for factor in (1.0, 1.0 - step, 1.0 + step)
    )
    slope = (colder.log_probs - hotter.log_probs) / (2 * step)
    np.testing.assert_allclose(slope, here.log_probs + here.entropy, rtol=1e-5, atol=1e-5)


# ---- the tokens


def test_tokens_of_the_right_distribution_raise_no_alarm():
    """From flat to nearly certain distributions; a false alarm is allowed once in a million."""
    rng = np.random.default_rng(0)
    for _ in range(1000):
        logits = rng.normal(size=(256, 30)) * rng.choice([0.2, 1, 3, 10, 30])
        logits[:, 0] += rng.choice([0, 5, 15])
        probs = np.exp(logits - logits.max(-1, keepdims=True))
        probs /= probs.sum(-1, keepdims=True)
        tokens = (probs.cumsum(-1) > rng.uniform(size=(256, 1))).argmax(-1)
        assert diagnose_draws(lambda temperature, z=logits, y=tokens: numpy_scores(z, y, temperature), 1.0) is None


def numpy_scores(logits, tokens, temperature):
    scaled = logits / temperature
    scaled = scaled - scaled.max(-1, keepdims=True)
    log_probs = scaled - np.log(np.exp(scaled).sum(-1, keepdims=True))
    entropy = -(np.exp(log_probs) * log_probs).sum(-1)
    return Scores(log_probs[np.arange(len(tokens)), tokens], entropy)


@each_dtype
@pytest.mark.parametrize(("drawn", "direction"), [(0.0, "colder"), (0.5, "colder"), (2.0, "hotter")])
@pytest.mark.parametrize("scale", [8.0, 16.0])
def test_tokens_drawn_at_another_temperature_than_reported_are_noticed(dtype, scale, drawn, direction):
    for seed in range(3):
        engine, trainer = Model(seed, scale, dtype), Model(seed, scale)
        ids = draw(engine, drawn, seed)
        at = trainer_at(trainer, ids)
        assert diagnose(engine_log_probs(engine, ids, 1.0), at, 1.0, limit=LIMITS[dtype]) is None
        found = diagnose_draws(at, 1.0)
        (temperature,) = re.findall(r"likelier at temperature ([0-9.]+) than", found)
        assert (float(temperature) < 1) == (direction == "colder")


@given(st.integers(0, 999), st.floats(0.1, 10), st.sampled_from(DRAWN_FACTORS))
def test_the_gain_of_another_temperature_is_bounded_by_what_one_forward_tells(seed, scale, factor):
    rng = np.random.default_rng(seed)
    logits, tokens = rng.normal(size=(20, 10)) * scale, rng.integers(10, size=20)
    here, there = (numpy_scores(logits, tokens, temperature) for temperature in (1.0, factor))
    gain = (there.log_probs - here.log_probs).sum()
    assert gain <= (1 / factor - 1) * (here.log_probs + here.entropy).sum() + 1e-6


def test_the_limit_is_that_of_one_false_alarm_in_a_million():
    assert len(DRAWN_FACTORS) * math.exp(-DRAWN_LIMIT) == pytest.approx(1e-6)


# ---- the whole check


CONFIG = load(["actor_rollout_ref.model.path=m", "actor_rollout_ref.rollout.name=hf"]).config
SAMPLING = SamplingParams(max_new_tokens=LENGTH)


def check(model, *, drawn=1.0, said=1.0, sampling=SAMPLING, mask=1):
    ids = draw(model, drawn)
    response = Ragged.from_rows(list(ids[:, 2:].numpy()), np.int32)
    columns = {
        "response_ids": response,
        "response_mask": response.like(np.full(ROWS * LENGTH, mask, np.int8)),
        "rollout_log_probs": response.like(engine_log_probs(model, ids, said)),
    }
    table = pa.table({"finish_reason": pa.array(["abort"] * ROWS, COLUMNS["finish_reason"])})
    table = with_columns(table, **columns)

    def score(temperature):
        found = scores(model, ids, temperature)
        return with_columns(table, old_log_probs=response.like(found.log_probs), entropy=response.like(found.entropy))

    return check_log_probs(table, score, CONFIG, sampling, "cpu")


def test_agreement_is_said_in_a_line():
    assert re.fullmatch(
        r"engine and trainer agree on the log-probs of 256 tokens: they differ by [0-9.e-]+ nats, at most [0-9.e-]+",
        check(Model()),
    )


def test_a_difference_ends_the_run_and_says_how_to_go_on():
    with pytest.raises(UserError, match=r"same distribution.*temperature 0\.8,.*trainer.check_log_probs=False"):
        check(Model(), said=0.8)


def test_tokens_drawn_otherwise_than_reported_end_the_run():
    with pytest.raises(UserError, match="draws from another distribution than it reports"):
        check(Model(0, 4.0), drawn=0.3)


@pytest.mark.parametrize("filtered", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"min_new_tokens": 3}])
def test_the_tokens_are_not_judged_where_they_are_drawn_from_a_part_of_the_vocabulary(filtered):
    sampling = SamplingParams(max_new_tokens=LENGTH, **filtered)
    assert "agree" in check(Model(0, 4.0), drawn=0.3, sampling=sampling)


def test_an_engine_that_writes_nothing_is_named():
    with pytest.raises(UserError, match=r"no token to any of 8 prompts \(abort\)"):
        check(Model(), mask=0)


def test_the_responses_of_the_check_are_short():
    sampling = check_sampling(SamplingParams(max_new_tokens=4096, min_new_tokens=100, temperature=0.7))
    assert sampling == SamplingParams(max_new_tokens=32, min_new_tokens=32, temperature=0.7)
    assert check_sampling(SamplingParams(max_new_tokens=5)).max_new_tokens == 5


@pytest.mark.parametrize(
    ("settings", "device", "limit"),
    [
        (["rollout.name=hf"], "cpu", FLOAT32_LIMIT),
        (["rollout.name=hf"], "cuda", HALF_LIMIT),
        (["rollout.name=hf", "actor.fsdp_config.dtype=float32", "rollout.dtype=bfloat16"], "cuda", FLOAT32_LIMIT),
        (["rollout.name=sglang", "actor.fsdp_config.dtype=float32"], "cuda", FLOAT32_LIMIT),
        (["rollout.name=sglang", "actor.fsdp_config.dtype=float32", "rollout.dtype=bfloat16"], "cuda", HALF_LIMIT),
        (["rollout.name=sglang", "actor.fsdp_config.dtype=bfloat16"], "cpu", HALF_LIMIT),
        (["rollout.name=sglang", "rollout.mode=server"], "cpu", HALF_LIMIT),
    ],
)
def test_the_limit_is_that_of_the_coarser_side(settings, device, limit):
    config = load(["actor_rollout_ref.model.path=m", *(f"actor_rollout_ref.{setting}" for setting in settings)]).config
    assert rounding_limit(config, device) == limit
