"""The engine and the models in training take turns on the device, over whole runs of the trainer's own loop.

A ``Device`` stands for the GPU's memory: it raises when two that must not be there together are, and when somebody
computes without what it needs. The engine is a real client, which refuses orders that make no sense.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import Capabilities, MemoryTag
from verl.rollout.loop import EventLoop
from verl.trainer.ppo.phases import Phases, put_to_sleep
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.trainer import PPOTrainer
from verl.trainer.ppo.weight_sync import WeightSync

BOTH: list[MemoryTag] = ["weights", "kv_cache"]


class Device:
    """awake: the engine's memory. loaded: roles whose models are on the device. cached: the trainer's allocator holds
    memory that it does not use. versions: of the engine's weights at each generation."""

    def __init__(self, sleep: Sequence[MemoryTag], borrows: bool):
        self.can_sleep, self.borrows = set(sleep), borrows
        self.awake: set[str] = set(BOTH)
        self.loaded: set[str] = set()
        self.cached = False
        self.version: int | None = None
        self.versions: list[int | None] = []
        self.trained = self.freed = 0
        self.compared: list[int | None] = []

    def wake(self, tags: Sequence[str]) -> None:
        assert not self.cached, "the trainer's allocator holds the memory that the engine needs"
        self.awake |= set(tags)

    def sleep(self, tags: Sequence[str]) -> None:
        self.awake -= set(tags)
        if "weights" in tags and not self.borrows:
            self.version = None

    def load(self, role: str) -> None:
        if "kv_cache" in self.can_sleep:
            assert "kv_cache" not in self.awake, f"{role} is loaded beside the KV cache"
        self.loaded.add(role)

    def unload(self, role: str, stays: bool) -> None:
        self.cached = True
        if not stays:
            self.loaded.discard(role)

    def free(self, tags: Sequence[str]) -> None:
        self.cached, self.freed = False, self.freed + 1

    def train(self) -> None:
        assert "actor" in self.loaded
        assert not self.awake & self.can_sleep, "trained beside the engine"
        self.trained += 1

    def save(self) -> None:
        if self.borrows:
            assert "weights" not in self.awake, "saved while the engine borrows the model"
        if "kv_cache" in self.can_sleep:
            assert "kv_cache" not in self.awake, "a model was exported beside the KV cache"

    def update_weights(self, version: int) -> None:
        if not self.borrows:
            assert {"weights"} <= self.awake
            assert "actor" in self.loaded
        self.version = version

    def generate(self) -> None:
        assert self.awake == set(BOTH)
        assert not self.borrows or "actor" in self.loaded
        self.versions.append(self.version)


class Backend:
    """See ``verl.rollout.client.backend.Backend``."""

    def __init__(self, device: Device):
        self.device, self.keeps_weights = device, device.borrows
        self.capabilities = Capabilities(sleep=frozenset(device.can_sleep), holds_weights=not device.borrows)
        self.update_seconds = {"gather": 0.25, "wait": 0.5}

    def listen(self, listener: object) -> None:
        pass

    def update_weights(self, stream: object, version: int) -> None:
        self.device.update_weights(version)

    def check_weights(self, stream: object) -> list[str]:
        self.device.compared.append(self.device.version)
        return []

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self.device.sleep(tags)

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        self.device.wake(tags)

    def drop_cache(self) -> None:
        pass


class Workers:
    """takes: seconds of calls."""

    def __init__(self, device: Device):
        self.device, self.takes = device, dict[str, float]()

    def call(self, method: str, *args: Any) -> Future:
        time.sleep(self.takes.get(method, 0.0))
        if method == "load":
            self.device.load(args[0])
        elif method == "unload":
            self.device.unload(args[0], stays=args[1])
        elif method == "free_memory":
            self.device.free(args[0])
        elif method == "save":
            self.device.save()
        return answered([SimpleNamespace(flops=0.0, peak_flops=0.0, memory=0)])

    def map(self, method: str, table: None) -> Future:
        self.device.train()
        return answered(table)


def answered(value: Any) -> Future:
    future: Future = Future()
    future.set_result(value)
    return future


class Feed:
    """generations: of each step, before each of which but the first the engine gets its weights again, as it slept
    while a reward model scored."""

    def __init__(self, stages: Stages, sync: WeightSync, device: Device, generations: int):
        self.stages, self.sync, self.device, self.generations = stages, sync, device, generations

    def generate(self, log: StepLog) -> None:
        with self.stages.generating(log):
            self.stages.runtime.rollout._state.check_generate()
            self.device.generate()

    def take(self, step: int, log: StepLog) -> None:
        for number in range(self.generations):
            if number:
                self.sync.send_again(log)
            self.generate(log)
            self.stages.make_room_for_training(log)

    def released(self, version: int) -> None:
        pass


class Trainer(PPOTrainer):
    """Forwards and updates of the actor alone."""

    def update(self, table: None, step: int, log: StepLog) -> None:
        with self.stages.computing(log, "update_actor", "actor", optimizer=True, stays_loaded=True):
            self.stages.runtime.workers.map("update_actor", None)

    def nothing(self, *_: object) -> None:
        pass

    rollout_correction = ref_log_probs = values = advantages = report = nothing


@contextmanager
def stage(name: str, total: int | None = None) -> Iterator[None]:
    yield None


@pytest.fixture
def loop():
    loop = EventLoop()
    yield loop
    loop.close()


def engine_on(device: Device) -> ClientEngine:
    return ClientEngine(
        Backend(device), eos_token_ids=[1], max_model_len=10, vocab_size=10, no_weights="none have come"
    )


def runtime_of(device: Device, loop: EventLoop) -> Runtime:
    engine = engine_on(device)
    put_to_sleep(engine, loop)
    progress = SimpleNamespace(stage=stage)
    return Runtime(loop, Workers(device), engine, lambda: [("weight", torch.zeros(1))], progress)  # type: ignore[arg-type]


def run(
    loop: EventLoop,
    sleep: Sequence[MemoryTag],
    borrows: bool = False,
    *,
    validates: Sequence[int] = (),
    steps: int = 2,
    saves: bool = False,
    generations: int = 1,
) -> Device:
    """The device after a run, on which nothing forbidden has happened."""
    device = Device(sleep, borrows)
    stages = Stages(runtime_of(device, loop))
    sync = WeightSync(stages, "first")
    feed = Feed(stages, sync, device, generations)

    def save(step: int, table: None, log: StepLog, *, sound: bool) -> None:
        assert sound
        stages.phases.update()
        stages.runtime.workers.call("save", "folder").result()
        log.timer.seconds["save_checkpoint"] = 0.0

    trainer = Trainer(
        SimpleNamespace(algorithm=SimpleNamespace(adv_estimator="gae")),
        SimpleNamespace(
            last_step=steps, validates=lambda step: step in validates, saves=lambda step: saves, save_freq=-1
        ),
        stages=stages,
        feed=feed,
        weight_sync=sync,
        validation=SimpleNamespace(run=lambda step, log: feed.generate(log)),
        state=SimpleNamespace(save=save, unsaved=None),
        samples=None,
        kl_control=None,
        trackers=SimpleNamespace(log=lambda metrics, step: None),
    )
    trainer.updates = SimpleNamespace(actor=trainer.update, critic=trainer.nothing, last_skipped=set())
    assert trainer.fit()
    assert device.trained == 2 * steps
    return device


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("validates", [[], [0], [0, 1, 2], [1], [2]])
@pytest.mark.parametrize(("sleep", "borrows"), [(BOTH, False), (["kv_cache"], False), (["weights"], True), ([], False)])
def test_engine_and_models_take_turns_and_each_step_is_generated_with_the_weights_of_the_step_before(
    loop, sleep, borrows, validates, saves
):
    device = run(loop, sleep, borrows, validates=validates, saves=saves, steps=3)
    expected = [0] * (0 in validates)
    for step in (1, 2, 3):
        expected += [step - 1] + [step] * (step in validates)
    assert device.versions == expected
    assert device.compared == ([] if borrows else [0])


def test_weights_that_are_sent_again_within_a_step_keep_their_version(loop):
    assert run(loop, BOTH, generations=2).versions == [0, 0, 1, 1]


def test_memory_is_freed_only_before_the_engine_wakes(loop):
    assert run(loop, BOTH, steps=2).freed == 3 + 2  # before each weight update, and before each generation
    assert run(loop, [], steps=2).freed == 0


def test_a_phase_that_failed_is_tried_again(loop):
    """The models hold the memory that the engine needs. Once some is given back, the engine wakes."""
    device = Device(BOTH, borrows=False)
    engine = engine_on(device)
    put_to_sleep(engine, loop)
    phases = Phases(engine, loop, lambda tags: None)
    device.cached = True
    with pytest.raises(AssertionError, match="holds the memory"):
        phases.generate()
    assert device.awake == set()
    device.cached = False
    phases.generate()
    assert device.awake == set(BOTH)


def test_the_seconds_of_a_weight_update_are_reported_by_its_parts(loop):
    device, log = Device(BOTH, borrows=False), StepLog()
    runtime = runtime_of(device, loop)
    runtime.workers.takes = {"free_memory": 0.05, "load": 0.01, "unload": 0.02}  # type: ignore[attr-defined]
    sync = WeightSync(Stages(runtime), "first")

    def parts() -> dict[str, float]:
        start = "timing_part_s/update_weights/"
        return {name.removeprefix(start): value for name, value in log.metrics.items() if name.startswith(start)}

    sync.send(log, 0)
    assert parts().keys() == {"room", "load", "gather", "wait"}
    assert (parts()["gather"], parts()["wait"]) == (0.25, 0.5)
    assert parts()["room"] >= 0.05
    assert parts()["load"] >= 0.03
    assert parts()["room"] + parts()["load"] <= log.timer.seconds["update_weights"]
    sync.send(log, 0)  # once more in the same step
    assert parts()["wait"] == 1.0
    assert parts()["load"] >= 0.06
