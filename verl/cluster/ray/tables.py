"""Tables on their way between processes: as Arrow's own stream, of which Ray shares the memory without a copy.

A pickled slice of a table would carry all of the table that it was cut from.
"""

from __future__ import annotations

from typing import NewType

import numpy as np
import pyarrow as pa

from verl.data.ragged import offsets_of

Rows = NewType("Rows", np.ndarray)  # uint8; pickle hands numpy's memory over as it is


def packed(table: pa.Table) -> Rows:
    size = pa.MockOutputStream()
    _write(table, size)
    rows = np.empty(size.size(), np.uint8)
    _write(table, pa.FixedSizeBufferWriter(pa.py_buffer(rows)))
    return Rows(rows)


def _write(table: pa.Table, sink: pa.NativeFile) -> None:
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def unpacked(rows: Rows) -> pa.Table:
    """The table lies in the memory of ``rows``."""
    return pa.ipc.open_stream(pa.py_buffer(rows)).read_all()


def taken(table: pa.Table, rows: np.ndarray) -> pa.Table:
    """``table.take(rows)``, its columns in one chunk each. Faster on token columns: a row's tokens are copied together,
    where Arrow looks each of them up."""
    if not len(rows):
        return table.slice(0, 0)
    lists = [field.name for field in table.schema if _holds_numbers(field.type) and not table[field.name].null_count]
    found = {name: _taken_lists(table[name], rows) for name in lists}
    others = table.drop_columns(lists).take(pa.array(rows))
    columns = [found[name] if name in found else others[name] for name in table.column_names]
    return pa.table(columns, schema=table.schema)


def _holds_numbers(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type))


def _taken_lists(column: pa.ChunkedArray, rows: np.ndarray) -> pa.ListArray:
    offsets = [chunk.offsets.to_numpy() for chunk in column.chunks]  # of chunks that may be slices
    values = [chunk.values.to_numpy() for chunk in column.chunks]
    starts, ends = (np.concatenate([of_chunk[cut] for of_chunk in offsets])[rows] for cut in (np.s_[:-1], np.s_[1:]))
    chunk_of_row = np.repeat(np.arange(column.num_chunks), [len(chunk) for chunk in column.chunks])[rows]
    places = zip(chunk_of_row.tolist(), starts.tolist(), ends.tolist(), strict=True)
    tokens = np.concatenate([values[chunk][start:end] for chunk, start, end in places])
    return pa.ListArray.from_arrays(pa.array(offsets_of(ends - starts), pa.int32()), pa.array(tokens), column.type)
