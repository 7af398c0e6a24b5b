"""vLLM with a pause at each token: on two busy cores a test would not get its turns before a response has ended, as a
tiny model's token takes 2 ms, and ranks spin while they wait for each other."""

import time

from verl.rollout.engines.vllm import worker

PAUSE = 0.012  # seconds


class Worker(worker.Worker):
    def prepare(self) -> str | None:
        why_not = super().prepare()
        sample = self.model_runner.sampler.forward

        def slowly(*args, **kwargs):
            time.sleep(PAUSE)
            return sample(*args, **kwargs)

        self.model_runner.sampler.forward = slowly
        return why_not
