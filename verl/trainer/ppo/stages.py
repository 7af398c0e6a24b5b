"""What a stage needs around it: its time and progress, its model on the device, the engine awake or asleep."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pyarrow as pa

from verl.tracking import StageTimer
from verl.tracking.progress import Stage
from verl.trainer.ppo import metrics as measure
from verl.trainer.ppo.phases import Phases
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.step_log import StepLog


class Stages:
    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.phases = Phases(
            runtime.rollout, runtime.loop, lambda tags: runtime.workers.call("free_memory", tags).result()
        )

    @contextmanager
    def stage(self, log: StepLog, name: str, total: int | None = None) -> Iterator[Stage]:
        """Times the block as ``name`` and shows it on the console. total: how many parts it has."""
        with log.timer(name), self.runtime.progress.stage(name, total) as stage:
            yield stage

    @contextmanager
    def computing(
        self,
        log: StepLog,
        name: str,
        role: str,
        *,
        total: int | None = None,
        optimizer: bool = False,
        stays_loaded: bool = False,
    ) -> Iterator[Stage]:
        """A stage that computes with the role's model. Its MFU, memory and loading time go to the metrics; for a stage
        that runs several times in a step, MFU and memory are those of the last time. stays_loaded: as in ``loaded``."""
        before, inside = log.timer.seconds.get(name, 0.0), StageTimer()
        with (
            self.stage(log, name, total) as progress,
            self.loaded(role, optimizer, stays_loaded) as costs,
            inside("compute"),
        ):
            yield progress
        seconds = log.timer.seconds[name] - before
        log.set(measure.stage_metrics(name, costs, seconds))
        log.add({f"timing_part_s/{name}/load": seconds - inside.seconds["compute"]})

    def forward(self, log: StepLog, name: str, role: str, method: str, table: pa.Table) -> pa.Table:
        """The table that the workers' ``method`` returns, as the stage ``name`` of this role's model."""
        with self.computing(log, name, role):
            return self.runtime.workers.map(method, table).result()

    @contextmanager
    def loaded(
        self, role: str, optimizer: bool = False, stays_loaded: bool = False
    ) -> Iterator[list[measure.StageCost]]:
        """The role's model is on the device within the block. Yields a list that is filled at its end, with the cost of
        each rank. stays_loaded: the parameters stay on the device, because the next stage uses the same role."""
        costs: list[measure.StageCost] = []
        self.runtime.workers.call("load", role, optimizer).result()
        yield costs
        # Not in a finally: an error ends the run.
        costs += self.runtime.workers.call("unload", role, stays_loaded).result()

    @contextmanager
    def generating(self, log: StepLog) -> Iterator[None]:
        """The engine can generate within the block. It is awake, or the model that it borrows is loaded and whole."""
        rollout = self.runtime.rollout
        borrows = not rollout.capabilities.holds_weights
        with self.loaded("actor") if borrows else nullcontext():
            if rollout.capabilities.sleep:
                with self.stage(log, "wake"):
                    self.phases.generate()
            yield
            if borrows:
                self.phases.train()

    def make_room_for_training(self, log: StepLog) -> None:
        """Puts the engine to sleep, if it can sleep."""
        if self.runtime.rollout.capabilities.sleep:
            with self.stage(log, "sleep"):
                self.phases.train()
