"""Weight sync: the engine gets the actor's weights, and its copy is compared with them."""

from __future__ import annotations

from typing import Literal

from verl.errors import UserError
from verl.tracking import StageTimer
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog


class WeightSync:
    """check: when the engine's copy is compared with the actor's weights (``trainer.check_weights``).

    version: of the weights that were sent last; the step after which the actor had them."""

    def __init__(self, stages: Stages, check: Literal["never", "first", "always"]):
        self._stages, self._runtime, self._check = stages, stages.runtime, check
        self._compared = False
        self.version = 0

    def send(self, log: StepLog, version: int) -> None:
        """Sends the actor's weights as this version. UserError if the engine then holds other weights."""
        self.version = version
        self.send_again(log)

    def send_again(self, log: StepLog) -> None:
        """The same version once more, to an engine that lost its weights in sleep.

        Metrics, for an engine that holds weights: the seconds of each part (``timing_part_s/update_weights/...``)."""
        rollout, part = self._runtime.rollout, StageTimer()
        holds = rollout.capabilities.holds_weights
        with self._stages.stage(log, "update_weights"):
            with part("room"):
                self._stages.phases.update()
            with part("loaded"), self._stages.loaded("actor"), part("sent"):
                stream = self._runtime.weights() if holds else ()
                self._runtime.loop.run(rollout.update_weights(stream, version=self.version))
                if holds and (self._check == "always" or (self._check == "first" and not self._compared)):
                    self._compare(log)
        if holds:
            load = part.seconds["loaded"] - part.seconds["sent"]
            parts = {"room": part.seconds["room"], "load": load, **rollout.update_seconds}
            log.add({f"timing_part_s/update_weights/{kind}": seconds for kind, seconds in parts.items()})

    def _compare(self, log: StepLog) -> None:
        with self._stages.stage(log, "check_weights"):
            different = self._runtime.loop.run(self._runtime.rollout.check_weights(self._runtime.weights()))
        if different:
            raise UserError(
                f"after the weight update of step {self.version} the rollout engine does not hold the "
                f"actor's weights (trainer.check_weights={self._check}):\n  " + "\n  ".join(different)
            )
        self._compared = True
