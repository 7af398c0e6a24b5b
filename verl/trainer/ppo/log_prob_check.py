"""The log-prob check before the first step: a few responses, scored by the engine and by the trainer."""

from __future__ import annotations

import pyarrow as pa

from verl.agent.single_turn import episodes_of, roll_out
from verl.checks import log_probs
from verl.config.sections.models import Config
from verl.plan import RunPlan
from verl.trainer.ppo.sampling import training_sampling
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog

LOG_PROB_CHECK = -2  # the step in the seeds of these responses


def check_log_probs(config: Config, plan: RunPlan, prompts: pa.Table, stages: Stages, log: StepLog) -> str:
    """One line that says how far engine and trainer agree. UserError if they work with different distributions (see
    ``verl.checks.log_probs``). The engine sleeps afterwards, if it can sleep."""
    runtime, rollout = stages.runtime, config.actor_rollout_ref.rollout
    first = prompts.slice(0, log_probs.PROMPTS)
    episodes = episodes_of(first, n=1, seed=config.trainer.seed, step=LOG_PROB_CHECK)
    sampling = log_probs.check_sampling(training_sampling(rollout, config.data.max_response_length))
    with stages.stage(log, "log_prob_check"):
        with stages.generating(log):
            table = runtime.loop.run(roll_out(runtime.rollout, episodes, sampling))
        stages.make_room_for_training(log)

        def score(temperature: float) -> pa.Table:
            return runtime.workers.map("log_probs_at", table, temperature=temperature).result()

        with stages.loaded("actor"):
            return log_probs.check_log_probs(table, score, config, sampling, plan.device)
