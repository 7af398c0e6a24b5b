"""Peaks of a GPU's memory, on counters that stand in for torch's."""

import gc

import pytest
import torch

from verl.memory import device_memory
from verl.memory.device_memory import Peak, peaks

GPU = torch.device("cuda")


class Memory:
    """As torch's allocator counts what it gives away."""

    def __init__(self) -> None:
        self.taken = self.most = 0

    def take(self, nbytes: int) -> None:
        self.taken += nbytes
        self.most = max(self.most, self.taken)

    def reset(self, _: torch.device) -> None:
        self.most = self.taken


@pytest.fixture
def memory(monkeypatch) -> Memory:
    memory = Memory()
    monkeypatch.setattr(device_memory, "_before", {"allocated": 0, "reserved": 0})
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda device: memory.most)
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", memory.reset)
    return memory


def test_a_peak_is_of_what_came_since_it_began(memory):
    memory.take(10)
    memory.take(-8)
    peak = Peak(GPU)
    assert peak.bytes == 2
    memory.take(3)
    memory.take(-4)
    assert peak.bytes == 5
    assert peaks(GPU) == {"allocated": 10, "reserved": 10}


def test_one_that_begins_later_takes_nothing_from_those_that_go_on(memory):
    stage = Peak(GPU)
    memory.take(7)
    memory.take(-6)
    update = Peak(GPU)
    memory.take(2)
    assert (stage.bytes, update.bytes) == (7, 3)
    another = Peak(GPU)
    memory.take(9)
    memory.take(-9)
    assert (stage.bytes, update.bytes, another.bytes) == (12, 12, 12)
    assert peaks(GPU)["allocated"] == 12


def test_one_that_nobody_holds_is_forgotten(memory):
    Peak(GPU)
    gc.collect()
    kept = Peak(GPU)
    assert set(Peak._going_on) == {kept}


def test_a_cpu_has_none(memory):
    peak = Peak(torch.device("cpu"))
    memory.take(5)
    assert peak.bytes == 0
