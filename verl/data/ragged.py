"""Ragged token columns: an Arrow list column seen as flat values and row offsets, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import DTypeLike


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths, end to end.

    values: shape (N,), any dtype: all rows' tokens in order.
    offsets: int64, shape (B + 1,): row b is ``values[offsets[b]:offsets[b + 1]]``.
    """

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_column(cls, column: pa.ChunkedArray | pa.Array) -> Ragged:
        """A view of a list column (no copy when it is one chunk without nulls)."""
        array = column
        if isinstance(column, pa.ChunkedArray):
            chunks = column.chunks or [pa.array([], column.type)]
            array = chunks[0] if len(chunks) == 1 else pa.concat_arrays(chunks)  # which copies even a single one
        if array.null_count:
            raise ValueError("a token column holds nulls")
        offsets = array.offsets.to_numpy().astype(np.int64)
        values = array.values.to_numpy(zero_copy_only=False)[offsets[0] : offsets[-1]]
        return cls(values, offsets - offsets[0])

    @classmethod
    def from_rows(cls, rows: Sequence[Sequence | np.ndarray], dtype: DTypeLike) -> Ragged:
        lengths = np.array([len(row) for row in rows], np.int64)
        values = np.concatenate([np.asarray(row, dtype) for row in rows]) if len(rows) else np.empty(0, dtype)
        return cls(values, offsets_of(lengths))

    def to_column(self) -> pa.ListArray:
        return pa.ListArray.from_arrays(pa.array(self.offsets, pa.int32()), pa.array(self.values))

    def like(self, values: np.ndarray) -> Ragged:
        """The same rows holding other values."""
        if len(values) != len(self.values):
            raise ValueError(f"{len(values)} values for {len(self.values)} tokens")
        return Ragged(values, self.offsets)

    @property
    def lengths(self) -> np.ndarray:
        """int64, shape (B,)."""
        return np.diff(self.offsets)

    @property
    def row_of_token(self) -> np.ndarray:
        """int64, shape (N,): the row each token belongs to."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def row_sums(self, values: np.ndarray | None = None) -> np.ndarray:
        """float64, shape (B,): each row's sum of ``values`` (this column's own by default); 0 for an empty row."""
        values = self.values if values is None else values
        sums = np.zeros(len(self))
        filled = np.flatnonzero(self.lengths)
        if len(filled):
            sums[filled] = np.add.reduceat(values, self.offsets[filled], dtype=np.float64)
        return sums

    def spread(self, per_row: np.ndarray) -> np.ndarray:
        """Shape (N,): each row's value repeated for each of its tokens."""
        return np.repeat(np.asarray(per_row), self.lengths)


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
