"""Tables on their way between processes: as Arrow's own stream, of which Ray shares the memory without a copy.

A pickled slice of a table would carry all of the table that it was cut from.
"""

from __future__ import annotations

from typing import NewType

import numpy as np
import pyarrow as pa

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
