"""SGLang with a pause at each token, for the reason that ``slow_vllm`` gives. Its processes have to find this file."""

import time

PAUSE = 0.012  # seconds
FORWARD_HOOKS = [{"name": "slow", "target_modules": ["model"], "hook_factory": "slow_sglang:slowly"}]  # its argument


def slowly(config):
    return lambda module, args, output: time.sleep(PAUSE)
