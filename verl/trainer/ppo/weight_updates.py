"""The actor's weights on their way to the rollout engine, what that takes, and whether the engine then holds them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Literal

from verl.errors import UserError
from verl.rollout.client.backend import WeightStream
from verl.rollout.contract.base import RolloutEngine
from verl.tracking import StageTimer
from verl.trainer.ppo.phases import Phases


class WeightUpdates:
    """weights: the actor's, to be streamed while ``loaded()`` holds. stage: times what happens within, by its name.
    check: when the engine's copy is compared with them (``trainer.check_weights``). checked: whether it once was.
    version: of the weights: the step after which they are."""

    def __init__(
        self,
        rollout: RolloutEngine,
        weights: Callable[[], WeightStream],
        phases: Phases,
        *,
        check: Literal["never", "first", "always"],
        stage: Callable[[str], AbstractContextManager[object]],
        loaded: Callable[[], AbstractContextManager[object]],
    ):
        self._rollout, self._weights, self._phases, self._check = rollout, weights, phases, check
        self._stage, self._loaded = stage, loaded
        self.version, self.checked = 0, False

    def send(self) -> dict[str, float]:
        """Gives the seconds of its parts (``timing_part_s/update_weights/...``), of an engine that holds weights."""
        holds, part = self._rollout.capabilities.holds_weights, StageTimer()
        with self._stage("update_weights"):
            with part("room"):
                self._phases.update()
            with part("loaded"), self._loaded(), part("sent"):
                asyncio.run(self._rollout.update_weights(self._weights() if holds else (), version=self.version))
                if holds and (self._check == "always" or (self._check == "first" and not self.checked)):
                    self._compare()
        if not holds:
            return {}
        load = part.seconds["loaded"] - part.seconds["sent"]
        parts = {"room": part.seconds["room"], "load": load, **self._rollout.update_seconds}
        return {f"timing_part_s/update_weights/{kind}": seconds for kind, seconds in parts.items()}

    def _compare(self) -> None:
        with self._stage("check_weights"):
            if different := asyncio.run(self._rollout.check_weights(self._weights())):
                raise UserError(
                    f"after the weight update of step {self.version} the rollout engine does not hold the "
                    f"actor's weights (trainer.check_weights={self._check}):\n  " + "\n  ".join(different)
                )
        self.checked = True
