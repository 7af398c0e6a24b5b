"""Tables on their way between processes: as Arrow's own stream, of which Ray shares the memory without a copy.

A pickled slice of a table would carry all of the table that it was cut from.
"""

from __future__ import annotations

from typing import NewType

import numpy as np
import pyarrow as pa

Rows = NewType("Rows", np.ndarray)  # uint8; pickle hands numpy's memory over as it is


def packed(table: pa.Table) -> Rows:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return Rows(np.frombuffer(sink.getvalue(), np.uint8))


def unpacked(rows: Rows) -> pa.Table:
    return pa.ipc.open_stream(pa.py_buffer(rows)).read_all()
