"""Responses to prompts, with scores. Scorers run while other responses are generated, a reward model afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
import pyarrow as pa

from verl.agent.single_turn import roll_out
from verl.data.schema import with_columns
from verl.errors import UserError
from verl.reward.manager import RewardManager
from verl.reward.model_inputs import RewardModelInputs
from verl.reward.pool import Outcome
from verl.rollout.contract.base import Result, SamplingParams
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.weight_sync import WeightSync


class Responder:
    """rewards: None if the reward model alone scores. reward_inputs: None without a reward model."""

    def __init__(
        self,
        stages: Stages,
        weight_sync: WeightSync,
        rewards: RewardManager | None,
        reward_inputs: RewardModelInputs | None,
    ):
        self._stages, self._runtime, self._weight_sync = stages, stages.runtime, weight_sync
        self._rewards, self._reward_inputs = rewards, reward_inputs

    def respond(
        self, episodes: pa.Table, sampling: SamplingParams | Sequence[SamplingParams], log: StepLog
    ) -> pa.Table:
        """The episodes with their trajectory columns and ``score``. sampling: for all episodes, or for each.

        With a reward model, the engine sleeps afterwards: call ``restore_weights`` before it generates again."""
        rewards = self._rewards
        references = episodes.select(["data_source", "prompt", "ground_truth", "extra_info"]).to_pylist()
        scores: dict[int, Future[Outcome]] = {}  # by row
        with (
            self._stages.generating(log),
            self._stages.stage(log, "gen", total=episodes.num_rows) as progress,
        ):

            def finished(index: int, result: Result) -> None:
                if rewards is not None:
                    scores[index] = rewards.submit(references[index], result.response_ids)
                progress.advance(tokens=len(result.response_ids))

            table = self._runtime.loop.run(roll_out(self._runtime.rollout, episodes, sampling, finished))
        if rewards is not None:
            with self._stages.stage(log, "reward"):
                table, metrics = rewards.collect(table, [scores[row] for row in range(table.num_rows)])
            log.add(metrics)
        if self._reward_inputs is not None:
            self._stages.make_room_for_training(log)
            table = self._reward_model_scores(table, self._reward_inputs, log)
        return table

    def _reward_model_scores(self, table: pa.Table, inputs: RewardModelInputs, log: StepLog) -> pa.Table:
        """``score`` with the reward model's score in place of the scorers', or added to it."""
        with self._stages.computing(log, "reward_model", "reward"):
            scored = self._runtime.workers.map("reward_scores", inputs(table)).result()
        found = scored["score"].to_numpy()
        if not np.isfinite(found).all():
            count = int((~np.isfinite(found)).sum())
            raise UserError(
                f"the reward model (reward_model.model.path) gave {count} of {len(found)} responses a score that is "
                "not a finite number"
            )
        score = found + table["score"].to_numpy() if self._rewards else found
        return with_columns(table, score=score, reward_model_score=found)

    def restore_weights(self, log: StepLog) -> None:
        """Sends the engine its weights again, if it lost them while the reward model scored."""
        if self._reward_inputs is not None and self._runtime.rollout.capabilities.sleep:
            self._weight_sync.send_again(log)
