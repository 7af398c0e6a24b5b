"""Validation: responses to the validation prompts, scored and summed up."""

from __future__ import annotations

import pyarrow as pa

from verl.agent.single_turn import episodes_of
from verl.config.sections.models import Config
from verl.plan import RunPlan
from verl.trainer.ppo import metrics as measure
from verl.trainer.ppo.responder import Responder
from verl.trainer.ppo.samples import Samples
from verl.trainer.ppo.sampling import validation_sampling
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.validation_metrics import validation_metrics

VALIDATION = -1  # the step in the seeds of validation responses: they are the same in each validation


class Validation:
    """prompts: None if the run has no validation data; then ``run`` does nothing."""

    def __init__(self, config: Config, plan: RunPlan, prompts: pa.Table | None, responder: Responder, samples: Samples):
        self._config, self._plan, self._prompts = config, plan, prompts
        self._responder, self._samples = responder, samples

    def run(self, step: int, log: StepLog) -> None:
        """Metrics: ``val-core/...`` and ``val-aux/...``. All its stages count as the stage ``testing`` of the log."""
        if self._prompts is None:
            return
        rollout, seed, inner = self._config.actor_rollout_ref.rollout, self._config.trainer.seed, StepLog()
        with log.timer("testing"):
            episodes = episodes_of(self._prompts, n=rollout.val_kwargs.n, seed=seed, step=VALIDATION)
            sampling = validation_sampling(rollout, self._plan.max_response_length)
            table = self._responder.respond(episodes, sampling, inner)
            self._responder.restore_weights(inner)
        log.set(validation_metrics(table, seed=seed))
        log.set(
            {
                f"val-aux/{name.replace('/', '_', 1)}": value
                for name, value in (inner.metrics | measure.reward_model_metrics(table)).items()
                if name.startswith("reward")
            }
        )
        self._samples.write_validation(table, step)
