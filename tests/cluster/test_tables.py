"""Tables on their way between processes."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from verl.cluster.ray.tables import packed, unpacked
from verl.data.schema import COLUMNS, taken

ROWS = 7


def value(kind: pa.DataType, row: int):
    """Any value of a column, another in each row; lists are of different lengths, the first of them empty."""
    if pa.types.is_list(kind):
        return [value(kind.value_type, row + place) for place in range(row % 4)]
    if pa.types.is_string(kind):
        return f"é{row}"
    return row % 2 if pa.types.is_int8(kind) else row + 0.5 if pa.types.is_floating(kind) else row


def every_column(rows: int = ROWS) -> pa.Table:
    """Every column that a table of samples may have, and what no column of it is: nulls, bits, lists of lists."""
    columns = {name: pa.array([value(kind, row) for row in range(rows)], kind) for name, kind in COLUMNS.items()}
    others = {
        "nulls": pa.array([None if row % 3 else [row, None] for row in range(rows)], pa.list_(pa.int32())),
        "bits": pa.array([[row % 2 == 0] * (row % 3) for row in range(rows)], pa.list_(pa.bool_())),
        "nested": pa.array([[[row], []] for row in range(rows)], pa.list_(pa.list_(pa.int64()))),
        "halves": pa.array([np.float16(row) for row in range(rows)], pa.float16()),
    }
    return pa.table({**columns, **others})


def test_a_table_of_every_column_comes_back_as_it_was():
    table = every_column()
    assert unpacked(packed(table)).equals(table)
    through_pickle = pickle.loads(pickle.dumps(packed(table), protocol=5))
    assert unpacked(through_pickle).equals(table)


@pytest.mark.parametrize(("first", "count"), [(0, 3), (2, 3), (ROWS - 1, 1)])
def test_a_slice_comes_back_as_it_was_and_brings_nothing_of_the_rest(first, count):
    part = every_column().slice(first, count)
    assert unpacked(packed(part)).equals(part)

    long = every_column(1000)
    rows, alone = packed(long.slice(500 + first, count)), long.take(pa.array(range(500 + first, 500 + first + count)))
    assert len(rows) < 1.1 * len(packed(alone))  # padding differs
    assert value(pa.string(), 999).encode() not in rows.tobytes()


def test_a_table_of_several_chunks_and_a_slice_across_them_come_back_as_they_were():
    table = pa.concat_tables([every_column(), every_column(2), every_column()])
    for part in (table, table.slice(5, 6)):
        assert unpacked(packed(part)).equals(part)


@pytest.mark.parametrize("empty", [every_column(0), every_column().slice(3, 0), pa.table({"x": pa.array([], "int64")})])
def test_a_share_without_rows_keeps_its_columns(empty):
    found = unpacked(packed(empty))
    assert found.num_rows == 0
    assert found.schema == empty.schema


def test_an_unpacked_table_lies_in_the_memory_that_it_was_unpacked_from():
    rows = packed(every_column())
    begin = rows.ctypes.data
    table = unpacked(rows)
    for part in (table, table.slice(2, 3)):
        buffers = [buffer for column in part.columns for buffer in column.chunk(0).buffers() if buffer]
        assert len(buffers) >= part.num_columns
        assert all(begin <= buffer.address <= begin + len(rows) - buffer.size for buffer in buffers if buffer.size)


picks = st.lists(st.integers(0, 2 * ROWS - 1), max_size=12).map(lambda rows: np.array(rows, np.int64))


@given(picks)
def test_taken_rows_are_those_that_arrow_takes(rows):
    whole = every_column(2 * ROWS)
    chunks = pa.concat_tables([whole.slice(0, 3), whole.slice(3, 0), whole.slice(3, 6), whole.slice(9)])
    padded = pa.concat_tables([every_column(2), whole]).combine_chunks().slice(2)
    for table in (whole, chunks, padded):
        assert taken(table, rows).equals(whole.take(pa.array(rows)))


def test_taken_rows_are_in_one_chunk_and_hold_no_memory_of_the_table():
    table = pa.concat_tables([every_column(), every_column()])
    found = taken(table, np.array([12, 3]))
    lent = {address for column in table.columns for address in addresses(column)}
    for column in found.columns:
        assert column.num_chunks == 1
        assert not lent & addresses(column)


def addresses(column: pa.ChunkedArray) -> set[int]:
    return {buffer.address for chunk in column.chunks for buffer in chunk.buffers() if buffer and buffer.size}
