"""Where the ranks of a job live. The trainer knows only this page."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, Protocol

import numpy as np
import pyarrow as pa


class WorkerGroup(Protocol):
    """One worker object on each rank, called together. Every call returns at once with a future.

    A method that is called together must be: where it holds a collective, all ranks come to it in the same order.
    """

    world_size: int

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[list[Any]]:
        """``method`` with the same arguments on every rank; the ranks' answers in rank order."""
        ...

    def map(self, method: str, table: pa.Table, **kwargs: Any) -> Future[pa.Table]:
        """``method(rows, **kwargs)`` on every rank with its share of the rows. A worker answers with the rows it got,
        in the same order, and columns added; the future holds ``table`` with these columns."""
        ...

    def reduce(self, method: str, table: pa.Table, **kwargs: Any) -> Future[dict[str, float]]:
        """Like ``map`` for a method that answers with metrics, which are equal on every rank."""
        ...

    def shares(self, table: pa.Table) -> list[np.ndarray]:
        """The rows of ``table`` that each rank is given by ``map`` and ``reduce``."""
        ...

    def close(self) -> None: ...
