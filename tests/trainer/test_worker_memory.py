"""What a rank does with its device's memory as stages end and the rollout engine wakes. The engine and CUDA only note
what they are asked to do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.memory.device_memory import SPARE, Peak
from verl.trainer.ppo.worker import PPOWorker

WEIGHTS = 1000  # parameters of the actor


class Engine:
    flops = peak_flops = 0.0

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.module = torch.nn.Linear(WEIGHTS, 1, bias=False)

    def offload(self, *, params: bool, optimizer: bool) -> None:
        self.asked.append(("offload", params, optimizer))

    def copy_to_host(self) -> None:
        self.asked.append("copy")


def worker(engine: Engine, device: str = "cpu", **switches: bool) -> PPOWorker:
    made = object.__new__(PPOWorker)
    made.plan = SimpleNamespace(device=device)
    made.engines, made.fsdp_configs = {"actor": engine}, {"actor": SimpleNamespace(**switches)}
    made._stages = {"actor": (Peak(torch.device("cpu")), 0.0)}
    return made


@pytest.mark.parametrize("needed", [False, True])
@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("params", [False, True])
def test_parameters_that_are_needed_next_stay_and_their_copies_begin(params, optimizer, needed):
    engine = Engine()
    worker(engine, param_offload=params, optimizer_offload=optimizer).unload("actor", needed)
    copies = ["copy"] if params and needed else []
    assert engine.asked == [("offload", params and not needed, optimizer), *copies]


@pytest.mark.parametrize(
    ("tags", "free", "given"),
    [
        (["weights"], 4 * WEIGHTS + SPARE + 1, False),
        (["weights"], 4 * WEIGHTS + SPARE, True),
        (["kv_cache"], 1 << 40, True),
        (["kv_cache", "weights"], 1 << 40, True),
    ],
)
def test_memory_is_given_back_but_for_weights_that_fit(monkeypatch, tags, free, given):
    asked: list[str] = []
    for name in ("ipc_collect", "synchronize", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: asked.append(name))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1 << 40))
    worker(Engine(), "cuda").free_memory(tags)
    assert asked == (["ipc_collect", "synchronize", "empty_cache"] if given else [])
