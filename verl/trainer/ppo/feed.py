"""Where the trainer gets the table of a step from.

data order ──> feed ──> responder (engine, scorers, reward model) ──> take(step): table
                ^
                └── released(version): these weights are in the engine
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from verl.agent.single_turn import episodes_of, greedy_episodes_of
from verl.algorithms.advantages import resolve
from verl.algorithms.rewards import response_rewards
from verl.config.sections.models import Config
from verl.data.loader import PromptLoader
from verl.data.schema import with_columns
from verl.plan import RunPlan
from verl.trainer.ppo.dynamic_sampling import fill_step
from verl.trainer.ppo.responder import Responder
from verl.trainer.ppo.sampling import greedy, training_sampling
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog


class Feed(Protocol):
    """Prompt p of the data's order belongs to step p // B + 1, where B is the number of prompts a step."""

    def take(self, step: int, log: StepLog) -> pa.Table:
        """The table of this step: trajectories with their scores, in groups of ``rollout.n``. Steps are taken in order.
        Afterwards the engine sleeps, if it can sleep."""
        ...

    def released(self, version: int) -> None:
        """The engine has the weights of this version: what may be generated with them can start."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, as JSON can hold it."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class SynchronousFeed:
    """Generates the responses of a step when the step is taken, with the weights of the step before.

    Behind it: dynamic sampling (``algorithm.filter_groups``), and the greedy responses that some advantages need.
    """

    def __init__(self, config: Config, plan: RunPlan, prompts: pa.Table, stages: Stages, responder: Responder):
        self._config, self._plan, self._prompts = config, plan, prompts
        self._stages, self._responder = stages, responder
        self._loader = PromptLoader(prompts.num_rows, plan.prompts, shuffle=config.data.shuffle, seed=config.data.seed)
        self._needs_greedy = resolve(config.algorithm.adv_estimator).needs_greedy
        self._version: int | None = None

    def take(self, step: int, log: StepLog) -> pa.Table:
        """See ``Feed``. RuntimeError if the engine does not have the weights of step ``step`` - 1."""
        if self._version != step - 1:
            raise RuntimeError(f"step {step} needs the weights of step {step - 1}, not those of step {self._version}")
        epoch, rows = next(self._loader)
        log.set({"training/epoch": epoch})
        table = self._respond(rows, step, log)
        if self._config.algorithm.filter_groups.enable:
            table = self._with_differing_groups(table, step, log)
        self._stages.make_room_for_training(log)
        return table

    def _with_differing_groups(self, table: pa.Table, step: int, log: StepLog) -> pa.Table:
        def more(count: int, number: int) -> pa.Table:
            self._responder.restore_weights(log)
            _, rows = self._loader.draw(count)
            return self._respond(rows, step, log, number)

        table, given_back, metrics = fill_step(
            table,
            more,
            self._config.algorithm.filter_groups,
            groups=self._plan.prompts,
            samples=self._plan.samples,
            data_rows=self._loader.num_rows,
        )
        self._loader.give_back(given_back)
        log.set(metrics)
        return table

    def _respond(self, rows: Any, step: int, log: StepLog, draw: int = 0) -> pa.Table:
        """Scored responses to the prompts in these rows; with ``greedy_reward`` where the advantages need it."""
        prompts, rollout = self._prompts.take(rows), self._config.actor_rollout_ref.rollout
        episodes = episodes_of(prompts, n=rollout.n, seed=self._config.trainer.seed, step=step, draw=draw)
        sampling = training_sampling(rollout, self._config.data.max_response_length)
        if not self._needs_greedy:
            return self._responder.respond(episodes, sampling, log)
        both = pa.concat_tables([episodes, greedy_episodes_of(prompts, step=step)])
        samplings = [sampling] * episodes.num_rows + [greedy(sampling)] * prompts.num_rows
        table = self._responder.respond(both, samplings, log)
        sampled, greedy_ones = table.slice(0, episodes.num_rows), table.slice(episodes.num_rows)
        rewards = response_rewards(greedy_ones, self._config)
        return with_columns(sampled, greedy_reward=np.repeat(rewards, rollout.n))

    def released(self, version: int) -> None:
        self._version = version

    def state_dict(self) -> dict[str, Any]:
        return self._loader.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loader.load_state_dict(state)
