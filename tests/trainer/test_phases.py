"""Who has the device's memory when, over a whole run of the trainer's own loop. The engine is a client's, which refuses
orders that make no sense; its backend, the workers and the stages only note what they are asked to do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import Capabilities, MemoryTag
from verl.trainer.ppo.phases import Phases, put_to_sleep
from verl.trainer.ppo.trainer import PPOTrainer

BOTH: list[MemoryTag] = ["weights", "kv_cache"]


class Backend:
    """See ``verl.rollout.client.backend.Backend``."""

    def __init__(self, log: list[str], sleep: Sequence[MemoryTag], borrows: bool = False):
        self.capabilities, self.log = Capabilities(sleep=frozenset(sleep), holds_weights=not borrows), log
        self.keeps_weights, self.update_seconds = borrows, {"gather": 0.25, "wait": 0.5}

    def listen(self, listener: object) -> None:
        pass

    def update_weights(self, stream: object, version: int) -> None:
        self.log.append(f"weights {version}")

    def check_weights(self, stream: object) -> list[str]:
        self.log.append("check")
        return []

    def sleep(self, tags: Sequence[MemoryTag]) -> None:
        self.log.append("sleep " + " ".join(tags))

    def wake(self, tags: Sequence[MemoryTag]) -> None:
        self.log.append("wake " + " ".join(tags))

    def drop_cache(self) -> None:
        pass


class Workers:
    def __init__(self, log: list[str]):
        self.log = log

    def call(self, method: str, of: str | list[MemoryTag] = "", needed: bool = False, *_: Any) -> Future:
        """of: a role, or what is about to wake. needed: of an unloaded role's parameters."""
        kept = " kept" if method == "unload" and needed else ""
        self.log.append(f"{method} {of if isinstance(of, str) else ' '.join(of)}".strip() + kept)
        answer: Future = Future()
        answer.set_result([None])
        return answer


class Trainer(PPOTrainer):
    """The loop, with a generation that draws nothing and a training that loads the actor."""

    def __init__(
        self, rollout: ClientEngine, log: list[str], validates: Sequence[int] = (), steps: int = 2, saves=False
    ):
        super().__init__(
            config=SimpleNamespace(
                data=SimpleNamespace(shuffle=False, seed=0, max_response_length=4),
                algorithm=SimpleNamespace(adv_estimator="gae", kl_ctrl=SimpleNamespace(type="fixed", kl_coef=0.0)),
                trainer=SimpleNamespace(check_log_probs=False, check_weights="first", save_freq=-1),
            ),
            plan=SimpleNamespace(
                prompts=2, last_step=steps, validates=lambda step: step in validates, saves=lambda step: saves
            ),
            parts=SimpleNamespace(
                rollout=rollout,
                workers=Workers(log),
                weights=lambda: [("weight", torch.zeros(1))],
                checkpoints=SimpleNamespace(save=lambda step, write, state: write("folder")),
                train_prompts=SimpleNamespace(num_rows=4, take=lambda rows: rows),
                trackers=SimpleNamespace(progress=SimpleNamespace(stage=stage), log=lambda *_: None),
            ),
        )
        self.log = log

    def _generate(self) -> None:
        with self.generating():
            self.parts.rollout._state.check_generate()
            self.log.append("generate")

    def roll_out(self, prompts: Any) -> None:
        self._generate()
        self.make_room_for_training()

    def validate(self) -> None:
        self._generate()

    def old_log_probs(self, table: None) -> None:
        with self.loaded("actor"):
            self.log.append("train")

    def update_actor(self, table: None) -> None:
        with self.loaded("actor", optimizer=True, needed=True):
            self.log.append("update")

    def nothing(self, *_: object) -> None:
        pass

    rollout_correction = ref_log_probs = values = advantages = update_critic = report = nothing


class DrawsTwice(Trainer):
    """A reward model scores each draw of a step, and the engine loses its weights meanwhile."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.parts.reward_inputs = object()

    def _respond(self, prompts: Any, draw: int = 0) -> Any:
        self._generate()
        self.make_room_for_training()

    def roll_out(self, prompts: Any) -> None:
        self._respond(prompts)
        self._draw_more(1, draw=1)


@contextmanager
def stage(name: str, total: int | None):
    yield None


def run(
    sleep: Sequence[MemoryTag], borrows: bool = False, trainer_class: type[Trainer] = Trainer, **options: Any
) -> list[str]:
    """What is noted from the start of the engine to the end of the run."""
    log: list[str] = []
    engine = ClientEngine(
        Backend(log, sleep, borrows), eos_token_ids=[1], max_model_len=10, vocab_size=10, no_weights="none have come"
    )
    put_to_sleep(engine)
    trainer = trainer_class(engine, log, **options)
    assert trainer.fit()
    return log


UPDATE = ["free_memory weights", "wake weights", "load actor", "weights {}", "unload actor"]
CHECKED_UPDATE = [*UPDATE[:4], "check", "unload actor"]
STAGES = [*["load actor", "train", "unload actor"], *["load actor", "update", "unload actor kept"]]
TRAIN = ["sleep kv_cache weights", *STAGES]
FULL = ["free_memory kv_cache", "wake kv_cache"]


def test_engine_and_models_take_turns():
    assert run(BOTH) == [
        *["sleep kv_cache weights", *(order.format(0) for order in CHECKED_UPDATE)],
        *[*FULL, "generate", *TRAIN, *(order.format(1) for order in UPDATE)],
        *[*FULL, "generate", *TRAIN, *(order.format(2) for order in UPDATE)],
    ]


def test_validation_draws_before_the_engine_makes_room():
    assert run(BOTH, validates=[0, 1, 2]) == [
        *["sleep kv_cache weights", *(order.format(0) for order in CHECKED_UPDATE)],
        *[*FULL, "generate", "generate", *TRAIN, *(order.format(1) for order in UPDATE)],
        *[*FULL, "generate", "generate", *TRAIN, *(order.format(2) for order in UPDATE)],
        *[*FULL, "generate"],
    ]


def test_weights_that_come_back_within_a_step_are_told_the_version_that_they_had():
    log = run(BOTH, trainer_class=DrawsTwice)
    noted = [order for order in log if order == "generate" or order.startswith("weights")]
    assert noted == [
        *["weights 0", "generate", "weights 0", "generate"],
        *["weights 1", "generate", "weights 1", "generate", "weights 2"],
    ]


@pytest.mark.parametrize("saves", [False, True])
@pytest.mark.parametrize("validates", [[], [0], [0, 1, 2], [1], [2]])
def test_no_model_is_loaded_beside_the_cache_and_none_is_trained_beside_the_engines_weights(validates, saves):
    awake, kept = set(BOTH), False
    for order in run(BOTH, validates=validates, saves=saves, steps=3):
        name, *tags = order.split()
        if name in ("load", "unload"):
            kept = tags == ["actor", "kept"]
        elif kept:
            assert order in ("free_memory weights", "wake weights")
        if name == "sleep":
            awake -= set(tags)
        elif name == "wake":
            awake |= set(tags)
        elif name in ("load", "save"):  # which may load models to export them
            assert "kv_cache" not in awake
        elif name in ("train", "update"):
            assert not awake
        elif name == "generate":
            assert awake == set(BOTH)


def test_an_engine_that_gives_up_only_its_cache_keeps_its_weights():
    log = run(["kv_cache"], steps=1)
    assert [order for order in log if order.split()[0] in ("sleep", "wake", "free_memory")] == [
        *["sleep kv_cache", "free_memory kv_cache", "wake kv_cache", "sleep kv_cache"],
    ]


@pytest.mark.parametrize("saves", [False, True])
def test_an_engine_that_borrows_the_model_has_it_only_while_it_draws(saves):
    whole = False
    for order in run(["weights"], borrows=True, validates=[0, 1, 2], saves=saves):
        name, *_ = order.split()
        if name in ("sleep", "wake"):
            whole = name == "wake"
        elif name in ("train", "update", "save"):
            assert not whole
        elif name == "generate":
            assert whole


def test_an_engine_that_cannot_sleep_is_left_alone():
    update = ["load actor", "weights {}", "unload actor"]
    assert run([], validates=[1], steps=1) == [
        *["load actor", "weights 0", "check", "unload actor", "generate", *STAGES],
        *[*(order.format(1) for order in update), "generate"],
    ]


def test_memory_is_freed_only_where_the_engine_is_about_to_take_some():
    freed: list[str] = []
    engine = ClientEngine(Backend(freed, BOTH), eos_token_ids=[1], max_model_len=10, vocab_size=10)
    put_to_sleep(engine)
    phases = Phases(engine, lambda tags: freed.append("free_memory " + " ".join(tags)))
    for phase in (phases.train, phases.generate, phases.generate, phases.train, phases.update, phases.update):
        phase()
    assert freed == [
        *["sleep kv_cache weights", "free_memory kv_cache weights", "wake kv_cache weights"],
        *["sleep kv_cache weights", "free_memory weights", "wake weights"],
    ]


def test_a_phase_that_did_not_come_about_is_tried_again():
    """The models hold the memory that the engine needs: once some is given back, it wakes."""
    log: list[str] = []
    backend = Backend(log, BOTH)
    engine = ClientEngine(backend, eos_token_ids=[1], max_model_len=10, vocab_size=10)
    put_to_sleep(engine)
    phases = Phases(engine, lambda tags: None)
    wake = backend.wake
    backend.wake = lambda tags: (_ for _ in ()).throw(MemoryError("the GPU is full"))
    with pytest.raises(MemoryError):
        phases.generate()
    backend.wake = wake
    phases.generate()
    assert log[-1] == "wake kv_cache weights"


def test_what_a_weight_update_spent_its_time_on_is_reported():
    log: list[str] = []
    engine = ClientEngine(Backend(log, BOTH), eos_token_ids=[1], max_model_len=10, vocab_size=10)
    put_to_sleep(engine)
    trainer, takes = Trainer(engine, log), {"free_memory": 0.05, "load": 0.01, "unload": 0.02}
    call = trainer.parts.workers.call

    def slow(method: str, *arguments: Any) -> Future:
        time.sleep(takes[method])
        return call(method, *arguments)

    trainer.parts.workers.call = slow

    def parts() -> dict[str, float]:
        start = "timing_part_s/update_weights/"
        return {name.removeprefix(start): value for name, value in trainer.metrics.items() if name.startswith(start)}

    trainer.update_rollout_weights()
    assert parts().keys() == {"room", "load", "gather", "wait"}
    assert (parts()["gather"], parts()["wait"]) == (0.25, 0.5)
    assert parts()["room"] >= 0.05
    assert parts()["load"] >= 0.03
    assert parts()["room"] + parts()["load"] <= trainer.timer.seconds["update_weights"]
    trainer.update_rollout_weights()  # one more in the same step
    assert parts()["wait"] == 1.0
    assert parts()["load"] >= 0.06
