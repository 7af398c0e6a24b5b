"""Micro-batches: every row with a response in exactly one, within the limits, each token where its prediction is."""

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from hypothesis import given
from hypothesis import strategies as st

from verl.data.ragged import Ragged
from verl.engine.packing import FORWARD_TOKENS, Packer
from verl.plan import MicroBatching

LIMIT = st.none() | st.integers(1, 40)
LENGTHS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), max_size=12)


def packer_of(lengths: list[tuple[int, int]], packed: bool = False) -> Packer:
    """Prompts count down from -1 and responses up from 1, so that every token is known by its value."""
    prompts = [-1 - np.arange(prompt) for prompt, _ in lengths]
    responses = [1 + np.arange(response) for _, response in lengths]
    columns = {"prompt_ids": prompts, "response_ids": responses}
    table = pa.table({name: Ragged.from_rows(rows, np.int32).to_column() for name, rows in columns.items()})
    return Packer(table, torch.device("cpu"), packed)


@given(LENGTHS, LIMIT, LIMIT)
def test_rows_are_cut_within_both_limits_longest_first(lengths, rows, tokens):
    plan = packer_of(lengths).micro_batches(MicroBatching(rows, tokens))
    totals = np.array([prompt + response for prompt, response in lengths])
    dealt = [row for part in plan for row in part]
    assert sorted(dealt) == [row for row, (_, response) in enumerate(lengths) if response]
    assert all(totals[one] >= totals[two] for one, two in itertools.pairwise(dealt))
    for part in plan:
        assert rows is None or len(part) <= rows
        assert tokens is None or len(part) == 1 or len(part) * totals[part].max() <= tokens


def partitions(rows: list[int]) -> Iterator[list[list[int]]]:
    if not rows:
        yield []
        return
    first, *others = rows
    for parts in partitions(others):
        yield [[first], *parts]
        for place, part in enumerate(parts):
            yield [*parts[:place], [first, *part], *parts[place + 1 :]]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 200)), min_size=1, max_size=7), LIMIT, st.integers(1, 1400))
def test_no_partition_of_padded_rows_within_the_limits_costs_less(lengths, rows, tokens):
    """Of all, not only of consecutive rows. A forward costs its tokens with padding and a constant."""
    totals = np.array([prompt + response for prompt, response in lengths])

    def cost(parts):
        return sum(FORWARD_TOKENS["cpu"] + len(part) * totals[part].max() for part in parts)

    def within(part):
        return len(part) == 1 or (len(part) <= (rows or 7) and len(part) * totals[part].max() <= tokens)

    allowed = [parts for parts in partitions(list(range(len(lengths)))) if all(map(within, parts))]
    assert cost(packer_of(lengths).micro_batches(MicroBatching(rows, tokens))) == min(map(cost, allowed))


def test_short_rows_are_not_padded_to_a_long_one_and_like_rows_stay_together():
    long, short = (10, 390), (10, 10)
    plan = packer_of([short, long, short, (10, 12), short]).micro_batches(MicroBatching(max_tokens=16384))
    assert [part.tolist() for part in plan] == [[1], [3, 0, 2, 4]]


@given(LENGTHS, st.integers(1, 5))
def test_rows_limited_in_number_alone_are_that_many_in_each_but_the_last(lengths, rows):
    """Whatever padding it takes: so many were asked for."""
    lengths = [(prompt, 50 * response) for prompt, response in lengths]
    count = sum(response > 0 for _, response in lengths)
    sizes = [len(part) for part in packer_of(lengths).micro_batches(MicroBatching(rows))]
    assert sizes == [min(rows, count - start) for start in range(0, count, rows)]
    assert len(packer_of(lengths).micro_batches(MicroBatching())) == (count > 0)


@given(LENGTHS, st.integers(1, 5))
def test_each_response_token_is_predicted_from_the_token_before_it(lengths, rows):
    packer = packer_of(lengths)
    for part in packer.micro_batches(MicroBatching(rows)):
        micro = packer.micro_batch(part)
        before = micro.input_ids.flatten()[micro.positions]
        expected_targets, expected_before = [], []
        for row in part:
            prompt, response = lengths[row]
            sequence = [*(-1 - np.arange(prompt)), *(1 + np.arange(response))]
            expected_targets += sequence[prompt:]
            expected_before += sequence[prompt - 1 : -1]
        assert micro.targets.tolist() == expected_targets
        assert before.tolist() == expected_before
        assert micro.columns["row_ids"].tolist() == [row for row in part for _ in range(lengths[row][1])]
        assert micro.input_ids.shape == (len(part), max(sum(lengths[row]) for row in part) - 1)


@given(LENGTHS, st.integers(1, 5))
def test_what_was_cut_comes_back_in_the_order_of_the_table(lengths, rows):
    packer = packer_of(lengths)
    micros = [packer.micro_batch(part) for part in packer.micro_batches(MicroBatching(rows))] or [packer.filler()]
    column = packer.column(
        [micro.tokens for micro in micros], [micro.targets.float()[: len(micro.tokens)] for micro in micros]
    )
    assert column.to_pylist() == [list(range(1, response + 1)) for _, response in lengths]


@given(LENGTHS, LIMIT, LIMIT)
def test_packed_rows_are_cut_within_both_limits_and_none_has_room_for_an_earlier_one(lengths, rows, tokens):
    plan = packer_of(lengths, packed=True).micro_batches(MicroBatching(rows, tokens))
    totals = np.array([prompt + response for prompt, response in lengths])
    assert sorted(row for part in plan for row in part) == [
        row for row, (_, response) in enumerate(lengths) if response
    ]
    for number, part in enumerate(plan):
        assert rows is None or len(part) <= rows
        assert tokens is None or len(part) == 1 or totals[part].sum() <= tokens
        for earlier in plan[:number]:
            full = rows is not None and len(earlier) == rows
            assert full or (tokens is not None and totals[earlier].sum() + totals[part[-1]] > tokens)


@given(LENGTHS, st.integers(1, 5))
def test_packed_sequences_lie_end_to_end_each_with_positions_of_its_own(lengths, rows):
    packer = packer_of(lengths, packed=True)
    for part in packer.micro_batches(MicroBatching(rows)):
        micro = packer.micro_batch(part)
        ids, positions, ends, targets, before = [], [], [0], [], []
        for prompt, response in (lengths[row] for row in part):
            sequence = [*(-1 - np.arange(prompt)), *(1 + np.arange(response))]
            ids += sequence[:-1]
            positions += range(len(sequence) - 1)
            ends.append(len(ids))
            targets += sequence[prompt:]
            before += sequence[prompt - 1 : -1]
        assert micro.input_ids.tolist() == [ids]
        assert micro.layout["position_ids"].tolist() == [positions]
        assert micro.layout["cu_seq_lens_q"].tolist() == micro.layout["cu_seq_lens_k"].tolist() == ends
        assert micro.layout["max_length_q"] >= max(np.diff(ends))
        assert micro.targets.tolist() == targets
        assert micro.input_ids[0, micro.positions].tolist() == before
