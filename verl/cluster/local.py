"""Everything in this process: the executor for one device. Calls run when made and return finished futures."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import numpy as np
import pyarrow as pa


class LocalWorkerGroup:
    """See ``verl.cluster.base.WorkerGroup``."""

    world_size = 1

    def __init__(self, worker: Any):
        self._worker = worker

    def call(self, method: str, *args: Any, **kwargs: Any) -> Future[list[Any]]:
        return _finished(lambda: [getattr(self._worker, method)(*args, **kwargs)])

    def map(self, method: str, table: pa.Table, **kwargs: Any) -> Future[pa.Table]:
        return _finished(lambda: getattr(self._worker, method)(table, **kwargs))

    def reduce(self, method: str, table: pa.Table, **kwargs: Any) -> Future[dict[str, float]]:
        return _finished(lambda: getattr(self._worker, method)(table, **kwargs))

    def shares(self, table: pa.Table) -> list[np.ndarray]:
        return [np.arange(table.num_rows)]

    def close(self) -> None:
        close = getattr(self._worker, "close", None)
        if close:
            close()


def _finished(call) -> Future:
    future: Future = Future()
    try:
        future.set_result(call())
    except Exception as error:  # the caller sees it at .result(), as it would from another process
        future.set_exception(error)
    return future
