from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.data.loader import PromptLoader, epoch_order
from verl.errors import UserError


def take(loader: PromptLoader, count: int) -> list[tuple[int, list[int]]]:
    return [(epoch, rows.tolist()) for epoch, rows in islice(loader, count)]


def test_an_epoch_has_each_row_once_and_leaves_the_last_partial_batch_out():
    loader = PromptLoader(num_rows=10, batch_size=3, seed=1)
    batches = take(loader, 6)
    assert [epoch for epoch, _ in batches] == [0, 0, 0, 1, 1, 1]
    assert loader.steps_per_epoch == 3
    for epoch in (0, 1):
        rows = [row for number, batch in batches if number == epoch for row in batch]
        assert len(set(rows)) == 9
        assert set(rows) <= set(range(10))


def test_without_shuffling_the_rows_come_in_order_every_epoch():
    loader = PromptLoader(num_rows=5, batch_size=2, shuffle=False, seed=1)
    assert take(loader, 4) == [(0, [0, 1]), (0, [2, 3]), (1, [0, 1]), (1, [2, 3])]


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = [tuple(epoch_order(50, epoch, seed, True)) for epoch in (0, 1) for seed in (1, 2, -1)]
    assert len(set(orders)) == 6


def test_the_order_is_fixed_for_all_time():
    assert epoch_order(8, 0, 1, True).tolist() == [2, 0, 1, 4, 5, 6, 7, 3]


def test_every_place_is_equally_likely_for_every_row():
    counts = np.zeros((4, 4))
    for seed in range(4000):
        counts[np.arange(4), epoch_order(4, 0, seed, True)] += 1
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(4000 * 0.25 * 0.75)


@given(st.integers(1, 40), st.data())
def test_a_resumed_loader_goes_on_as_an_uninterrupted_one(num_rows, data):
    batch_size = data.draw(st.integers(1, num_rows))
    stop, more = data.draw(st.integers(0, 20)), data.draw(st.integers(1, 20))
    whole = take(PromptLoader(num_rows, batch_size, seed=3), stop + more)
    stopped = PromptLoader(num_rows, batch_size, seed=3)
    take(stopped, stop)
    state = json.loads(json.dumps(stopped.state_dict()))  # as a checkpoint keeps it
    resumed = PromptLoader(num_rows, batch_size, seed=3)
    resumed.load_state_dict(state)
    assert take(resumed, more) == whole[stop:]


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 8))
def test_resumed_with_another_batch_size_no_row_is_used_twice_in_an_epoch(before, after, stop):
    first = PromptLoader(12, before, seed=3)
    used = take(first, stop)
    second = PromptLoader(12, after, seed=3)
    second.load_state_dict(first.state_dict())
    used += take(second, 10)
    for epoch in {number for number, _ in used}:
        rows = [row for number, batch in used if number == epoch for row in batch]
        assert len(rows) == len(set(rows))
        assert rows == epoch_order(12, epoch, 3, True)[: len(rows)].tolist()


def test_resuming_with_other_data_is_refused():
    loader = PromptLoader(12, 4, seed=1)
    with pytest.raises(UserError, match=r"12 prompts, the checkpoint's had 11"):
        loader.load_state_dict(PromptLoader(11, 4, seed=1).state_dict())


def test_a_batch_larger_than_the_data_set_is_refused_with_what_would_work():
    with pytest.raises(UserError, match=r"data\.train_batch_size=1024.*100 prompts.*100 or less"):
        PromptLoader(100, 1024)


def test_rows_given_back_come_again_in_the_next_draw():
    loader = PromptLoader(10, 4, shuffle=False)
    assert loader.draw(3)[1].tolist() == [0, 1, 2]
    loader.give_back(2)
    assert next(loader)[1].tolist() == [1, 2, 3, 4]
    assert loader.draw(5)[1].tolist() == [5, 6, 7, 8, 9]
    loader.give_back(1)  # the last of an epoch
    resumed = PromptLoader(10, 4, shuffle=False)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    for other in (loader, resumed):
        assert [(epoch, rows.tolist()) for epoch, rows in (other.draw(1), other.draw(2))] == [(0, [9]), (1, [0, 1])]
