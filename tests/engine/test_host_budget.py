"""What the budget of host memory says beside what engines place there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_helpers import build
from forks import run_ranks

from verl.config.sections.parts import FSDPConfig, ModelConfig
from verl.engine import TrainEngine, checkpoint, offload
from verl.engine.model import model_size
from verl.memory import host_budget
from verl.memory.host_budget import Devices, Model, ModelMemory, budget_of
from verl.plan import ModelSize


def offloaded(path: str, kind: str, trained: bool, dtype: str, **settings) -> TrainEngine:
    """All of it, as it would be on a machine with a GPU."""
    engine = build(path, kind, trained=trained, dtype=dtype, **settings)
    engine._copies.moves = True
    engine.offload(params=True, optimizer=True)
    return engine


def placed(movable: offload.MovableTensors) -> tuple[int, int]:
    """Bytes, and in how many tensors."""
    assert movable._host is not None
    places = list(movable._host)
    memory = {place.untyped_storage().data_ptr(): place.untyped_storage().nbytes() for place in places}
    return sum(memory.values()), len(places)


def both(engine: TrainEngine) -> list[tuple[int, int]]:
    """Of weights and optimizer, without the buffers, which no budget counts."""
    weights, count = placed(engine._params)
    buffers = [buffer.nbytes for buffer in engine.root.buffers()]
    state = placed(engine._state) if engine.trainable else (0, 0)
    return [(weights - sum(buffers), count), state]


def budgeted(path: str, kind: str, trained: bool, dtype: str, ranks: int = 1, fsdp_size: int = -1) -> ModelMemory:
    settings = FSDPConfig(param_offload=True, optimizer_offload=True, dtype=dtype, fsdp_size=fsdp_size)
    size = model_size(ModelConfig(path=path), kind)
    model = Model("actor", "actor", settings, size, trained)
    return budget_of([model], Devices("cuda", 1, ranks), saves=True).models[0]


def assert_within_padding(expected: int, found: list[tuple[int, int]]) -> None:
    """Of each tensor to a cache line, on each rank."""
    bytes_found, tensors = (sum(each) for each in zip(*found, strict=True))
    assert expected <= bytes_found <= expected + tensors * offload.ALIGNMENT


@pytest.mark.parametrize(
    ("kind", "trained", "dtype"),
    [
        ("policy", True, "float32"),
        ("policy", True, "bfloat16"),
        ("value", True, "bfloat16"),
        ("policy", False, "float32"),
        ("policy", False, "bfloat16"),
    ],
)
def test_one_process_places_what_is_budgeted(any_tiny, kind, trained, dtype):
    weights, optimizer = both(offloaded(any_tiny, kind, trained, dtype))
    held = budgeted(any_tiny, kind, trained, dtype)
    assert_within_padding(held.weights, [weights])
    assert_within_padding(held.optimizer, [optimizer])
    assert held.optimizer > 0 or not trained


def of_rank(rank, world_size, path, kind, trained, dtype, fsdp_size):
    return both(offloaded(path, kind, trained, dtype, fsdp_size=fsdp_size))


@pytest.mark.parametrize(
    ("ranks", "fsdp_size", "trained", "dtype"),
    [(2, -1, True, "bfloat16"), (2, -1, False, "bfloat16"), (4, 2, True, "float32")],
)
def test_ranks_place_together_what_is_budgeted_for_their_machine(tiny, ranks, fsdp_size, trained, dtype):
    found = run_ranks(ranks, of_rank, tiny, "policy", trained, dtype, fsdp_size)
    held = budgeted(tiny, "policy", trained, dtype, ranks, fsdp_size)
    assert_within_padding(held.weights, [each[0] for each in found])
    assert_within_padding(held.optimizer, [each[1] for each in found])


@pytest.mark.parametrize("kind", ["policy", "value"])
def test_parameters_are_counted_without_reading_weights(any_tiny, kind, monkeypatch):
    expected = sum(param.numel() for param in build(any_tiny, kind).module.parameters())
    monkeypatch.setattr("verl.engine.model.read_model", lambda *args: pytest.fail("the weights were read"))
    assert model_size(ModelConfig(path=any_tiny), kind) == ModelSize(expected, "float32")


def test_the_budget_knows_the_engines_sizes():
    assert offload.PIECE == host_budget.PIECE
    assert 2 * checkpoint.FILE == host_budget.FILES


def test_a_model_whose_files_are_of_the_type_that_is_read_is_mapped_and_not_copied(tiny):
    """What ``ModelMemory.building`` goes by."""
    engine = build(tiny, trained=False)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [
        tuple(int(end, 16) for end in fields[0].split("-"))
        for fields in maps
        if len(fields) > 5 and fields[5].startswith(tiny)
    ]
    largest = max(engine.module.parameters(), key=torch.numel).data_ptr()
    assert any(start <= largest < end for start, end in ranges)
