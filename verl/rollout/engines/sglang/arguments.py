"""What SGLang is started with: its arguments and its environment, from our settings and from what is installed."""

from __future__ import annotations

import glob
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
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
    installed,
)

# Arguments that other keys of ours decide -> that key.
OWN_KEYS = {
    "model_path": "actor_rollout_ref.model.path",
    "tokenizer_path": "actor_rollout_ref.model.tokenizer_path",
    "trust_remote_code": "actor_rollout_ref.model.trust_remote_code",
    "tp_size": "actor_rollout_ref.rollout.tensor_model_parallel_size",
    "mem_fraction_static": "actor_rollout_ref.rollout.gpu_memory_utilization",
    "enable_memory_saver": "actor_rollout_ref.rollout.free_cache_engine",
    "disable_cuda_graph": "actor_rollout_ref.rollout.enforce_eager",
    "load_format": "actor_rollout_ref.rollout.load_format",
    "dtype": "actor_rollout_ref.rollout.dtype",
    "context_length": "actor_rollout_ref.rollout.max_model_len",
    "max_running_requests": "actor_rollout_ref.rollout.max_num_seqs",
    "pp_max_micro_batch_size": "actor_rollout_ref.rollout.max_num_seqs",
    "chunked_prefill_size": "actor_rollout_ref.rollout.max_num_batched_tokens",
    "random_seed": "trainer.seed",
    "device": "trainer.device",
    "nnodes": "trainer.nnodes",
    "node_rank": "trainer.nnodes",
    "dist_init_addr": "nothing (the ranks agree where they meet)",
    "json_model_override_args": "actor_rollout_ref.model.override_config",
    "base_gpu_id": "the environment variable CUDA_VISIBLE_DEVICES (the weight updates go to its first GPUs)",
    "dp_size": "nothing (one replica is one tensor-parallel group)",
    "pp_size": "nothing (one replica is one tensor-parallel group)",
    "custom_weight_loader": "nothing (the weight updates need it)",
    "skip_tokenizer_init": "nothing (token ids go in and come out)",
}

# Without a GPU, SGLang would size its KV cache by the machine's memory.
CPU_CACHE_TOKENS = 1 << 16
# Its own share of memory there falls with the requests that may run at once, below nothing with the usual 1024.
CPU_MEMORY_SHARE = 0.9
# Captured up to so many responses, on GPUs with so much memory (MiB).
GRAPHS, GRAPHS_NEED = 1024, 60 * 1024
# Arguments that say of what CUDA graphs are captured, and how.
OF_DRAWING = {
    "cuda_graph_backend_decode",
    "cuda_graph_max_bs_decode",
    "cuda_graph_bs_decode",
    "disable_decode_cuda_graph",
}
OF_PREFILLS = {
    "cuda_graph_backend_prefill",
    "cuda_graph_max_bs_prefill",
    "cuda_graph_bs_prefill",
    "disable_prefill_cuda_graph",
    "cuda_graph_tc_compiler",
}
MILESTONES = {
    r"Init torch distributed begin": "setting up the device",
    r"Load weight begin": "loading the weights",
    r"KV Cache is allocated": "the KV cache is allocated",
    r"Capture .*graph begin": "capturing CUDA graphs",
    r"(?i)\bcompiling\b|\bninja\b": "compiling kernels",
}
# SGLang keeps a few places of the context to itself.
CONTEXT_MARGIN = 8


def arguments_of(settings: EngineSettings, part: NodeShare = WHOLE) -> dict[str, Any]:
    arguments = {
        "model_path": settings.model_path,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "device": settings.device,
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "tp_size": settings.tensor_parallel,
        "context_length": settings.max_model_len + CONTEXT_MARGIN,
        # SGLang fills up to the lower of these. In the first a prompt whose prefill is cut takes two places: without
        # one more, the last of max_num_seqs responses would wait until another ends.
        "max_running_requests": settings.max_num_seqs + 1,
        "pp_max_micro_batch_size": settings.max_num_seqs,
        "chunked_prefill_size": settings.max_prefill_tokens,
        "disable_cuda_graph": settings.enforce_eager,
        "enable_memory_saver": settings.sleeps,
        "random_seed": settings.seed,
        "sleep_on_idle": True,  # an idle scheduler would keep a core busy that the trainer can use
        "log_level": "info",
        **backends(settings.device),
    }
    if settings.device == "cpu":
        wanted = settings.max_num_seqs * (settings.max_model_len + CONTEXT_MARGIN)
        arguments["max_total_tokens"] = max(min(wanted, CPU_CACHE_TOKENS), 2 * settings.max_model_len)
        arguments["mem_fraction_static"] = CPU_MEMORY_SHARE
    else:
        arguments["mem_fraction_static"] = settings.gpu_memory_utilization
    if part.rendezvous:
        arguments |= {"nnodes": part.nnodes, "node_rank": part.node_rank, "dist_init_addr": part.rendezvous}
    if settings.override_config:
        arguments["json_model_override_args"] = json.dumps(dict(settings.override_config))
    return arguments | dict(settings.extra)


def backends(device: str) -> dict[str, Any]:
    """Attention, sampling and grammar back-ends by what is installed; SGLang's own choice where there is one."""
    if device == "cpu":
        return {"attention_backend": "torch_native", "sampling_backend": "pytorch", "grammar_backend": "none"}
    flashinfer = installed("flashinfer-python")
    chosen: dict[str, Any] = {
        "sampling_backend": "flashinfer" if flashinfer else "pytorch",
        "grammar_backend": "xgrammar" if installed("xgrammar") else "none",
    }
    if not _has_flash_attention():
        chosen["attention_backend"] = "flashinfer" if flashinfer else "triton"
    return chosen


def cuda_graphs(arguments: Mapping[str, Any], memory: float) -> dict[str, Any]:
    """What SGLang captures CUDA graphs of, on a GPU with this much memory (MiB), where no other argument decides it.

    Drawing: as many responses at a time as run, up to ``GRAPHS``, where memory is not small. Its own choice is 256
    or 512, and more at a time wait for the launch of every kernel. Prefills:
    none. Capturing them takes half a minute or more of each start, and a step has only as many as its prompts fill.
    """
    named = arguments.keys()
    if arguments["device"] == "cpu" or arguments["disable_cuda_graph"] or "cuda_graph_config" in named:
        return {}
    chosen: dict[str, Any] = {} if named & OF_PREFILLS else {"cuda_graph_backend_prefill": "disabled"}
    if memory >= GRAPHS_NEED and not named & OF_DRAWING:
        chosen["cuda_graph_max_bs_decode"] = min(arguments["pp_max_micro_batch_size"], GRAPHS)
    return chosen


def environment_of(settings: EngineSettings, inherited: Mapping[str, str], part: NodeShare = WHOLE) -> dict[str, str]:
    environment = common_environment(settings, inherited, part) | {
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by CONTEXT_MARGIN; no position that far is ever computed
        "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
    }
    if part.address and part.interface:
        environment["SGLANG_HOST_IP"] = part.address
    if settings.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        if settings.tensor_parallel > 1:  # a rank for each group of cores, where there is no NUMA node for each
            groups = core_groups(settings.tensor_parallel // part.nnodes)
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(groups * part.nnodes))
        return environment
    if not installed("flashinfer-python"):
        environment["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"
    folders = [*_cuda_library_folders(), inherited.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = ":".join(folder for folder in folders if folder)
    return environment


def capabilities_of(settings: EngineSettings) -> Capabilities:
    return Capabilities(
        sleep=SLEEP if settings.sleeps else frozenset[MemoryTag](),
        own_process=True,
        min_new_tokens=SGLANG.no_min_new_tokens is None,
        seeded=False,
        window=settings.window,
    )


def describe(facts: Mapping[str, Any]) -> str:
    return (
        f"SGLang {facts['version']}: attention by {facts['attention_backend']}, sampling by "
        f"{facts['sampling_backend']}, room for {facts['max_total_tokens']:,} tokens"
    )


def _has_flash_attention() -> bool:
    """Whether the kernels are there that SGLang would choose on a Hopper GPU."""
    found = importlib.util.find_spec("sgl_kernel")
    folders = found.submodule_search_locations if found else None
    return any(glob.glob(f"{folder}/flash_ops*.so") for folder in folders or ())


def _cuda_library_folders() -> list[str]:
    """Where pip put CUDA's libraries: the memory saver needs the loader to find them before Python starts."""
    found = importlib.util.find_spec("nvidia")
    roots = list(found.submodule_search_locations or ()) if found else []
    libraries = [path for root in roots for path in glob.glob(f"{root}/**/libcudart.so*", recursive=True)]
    libraries += [path for root in roots for path in glob.glob(f"{root}/**/libnvrtc.so*", recursive=True)]
    return sorted({str(Path(path).parent) for path in libraries})


SGLANG = Adapter(
    name="sglang",
    title="SGLang",
    server="verl.rollout.engines.sglang.engine_process",
    distributions=("sglang",),
    own_keys=OWN_KEYS,
    spans_nodes=True,
    no_min_new_tokens="SGLang needs a tokenizer of its own for it, and runs without one here",
    wants_even_memory=True,
    pass_has_all=False,
    capabilities=capabilities_of,
    keeps_weights=lambda settings: bool(settings.extra.get("enable_weights_cpu_backup")),
    arguments=arguments_of,
    environment=environment_of,
    describe=describe,
    milestones=MILESTONES,
)
