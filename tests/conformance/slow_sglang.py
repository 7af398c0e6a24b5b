"""SGLang with a pause at each token, for the reason that ``slow_vllm`` gives."""

import time

PAUSE = 0.012  # seconds
HOOKS = [{"name": "slow", "target_modules": ["model"], "hook_factory": "slow_sglang:slowly"}]  # of SGLang's forwards


def slowly(config):
    return lambda module, args, output: time.sleep(PAUSE)
