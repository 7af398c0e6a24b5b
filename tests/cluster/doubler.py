"""The worker of tests/cluster/test_worker_group.py, importable by other processes."""

from __future__ import annotations

import os
import time

import pyarrow as pa
import torch
import torch.distributed as dist

from verl.errors import UserError


class Doubler:
    def __init__(self, rank: int = 0):
        self.rank = rank

    def greet(self, name, loud=False):
        return f"HELLO {name}" if loud else f"hello {name}"

    def double(self, rows, times=2):
        return rows.append_column("doubled", pa.array([times * x for x in rows["x"].to_pylist()], pa.int64()))

    def total(self, rows):
        total = torch.tensor(float(sum(rows["x"].to_pylist())))
        if dist.is_initialized():
            dist.all_reduce(total)
        return {"total": float(total)}

    def fail(self):
        raise UserError("from the worker")

    def fill_the_disk(self):
        raise OSError(28, "No space left on device")

    def alone(self, rank, how):
        """One rank does not come to where the others wait for it."""
        if self.rank == rank:
            if how == "raises":
                raise RuntimeError("it went wrong")
            if how == "dies":
                print("its last words", flush=True)
                os.kill(os.getpid(), 9)
            time.sleep(1000)
        dist.barrier()

    def close(self):
        pass


def make(here):
    return Doubler(here.rank)
