"""One update with each policy loss: the same for any micro-batch size, token budget and number of ranks."""

from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from engine_helpers import ALL, build, largest_difference, make_table, weights_of
from forks import run_ranks

from verl.algorithms.loss_modes import LOSS_MODES, resolve
from verl.algorithms.losses import loss_columns, policy_loss
from verl.config.sections.models import ActorConfig, PolicyLossConfig
from verl.data.ragged import Ragged
from verl.data.schema import ragged, with_columns
from verl.plan import MicroBatching

ROWS = 9
EPS = 1e-5  # see test_engine_updates
SPLITS = [MicroBatching(1), MicroBatching(4), MicroBatching(max_tokens=40)]


def settings_of(mode: str) -> ActorConfig:
    chosen = PolicyLossConfig(loss_mode=mode, clip_cov_ratio=0.2, clip_cov_lb=0.1, kl_cov_ratio=0.2)
    return ActorConfig(clip_ratio_low=0.2, clip_ratio_high=0.2, loss_agg_mode="seq-mean-token-mean", policy_loss=chosen)


def mini_batch(engine, mode: str) -> pa.Table:
    """Old log-probs near the engine's own, so that some ratios are clipped and some not."""
    table = make_table(ROWS)
    found = engine.log_probs(table, temperature=1.0, batching=ALL)["log_probs"]
    log_probs = Ragged.from_column(found)
    noise = np.random.default_rng(0).normal(0, 0.3, len(log_probs.values))
    table = with_columns(table, old_log_probs=log_probs.like((log_probs.values + noise).astype(np.float32)))
    return with_columns(table, **loss_columns(table, settings_of(mode), 14, (0,)))


def updated(engine, table: pa.Table, mini: pa.Table, mode: str, batching: MicroBatching):
    """Metrics and new weights; table: this rank's rows of the mini-batch."""
    loss = partial(
        policy_loss,
        token_loss=resolve(mode).load(),
        settings=settings_of(mode),
        num_tokens=int(ragged(mini, "response_mask").values.sum()),
    )
    metrics = engine.update(table, loss, batching=batching, entropy=False)
    return metrics, weights_of(engine)


def one_process(path: str, mode: str, batching: MicroBatching):
    engine = build(path, eps=EPS)
    mini = mini_batch(engine, mode)
    return updated(engine, mini, mini, mode, batching)


@pytest.mark.parametrize("mode", LOSS_MODES)
def test_an_update_is_the_same_for_any_split_into_micro_batches(tiny, mode):
    metrics, weights = one_process(tiny, mode, ALL)
    assert metrics["grad_norm"] > 0
    for batching in SPLITS:
        other_metrics, other = one_process(tiny, mode, batching)
        assert largest_difference(other, weights) < 1e-5, batching
        assert other_metrics == pytest.approx(metrics, rel=1e-4, abs=1e-6), batching


def on_a_rank(rank: int, world_size: int, path: str, minis: dict[str, pa.Table]):
    found = {}
    for mode, mini in minis.items():
        engine = build(path, eps=EPS)
        rows = mini.slice(0, 6) if rank == 0 else mini.slice(6)
        metrics, weights = updated(engine, rows, mini, mode, MicroBatching(2))
        found[mode] = metrics, {name: tensor.numpy() for name, tensor in weights.items()}
    return found


def test_an_update_is_the_same_on_two_ranks(tiny):
    minis = {mode: mini_batch(build(tiny), mode) for mode in LOSS_MODES}
    for answer in run_ranks(2, on_a_rank, tiny, minis):
        for mode, (metrics, weights) in answer.items():
            expected_metrics, expected = one_process(tiny, mode, ALL)
            assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-6), mode
            found = {name: torch.from_numpy(array) for name, array in weights.items()}
            assert largest_difference(found, expected) < 1e-5, mode
