"""The engines that run in a process of their own, by the name that ``rollout.name`` gives them."""

from verl.rollout.engines.sglang.arguments import SGLANG
from verl.rollout.engines.vllm.arguments import VLLM

ADAPTERS = {adapter.name: adapter for adapter in (SGLANG, VLLM)}
