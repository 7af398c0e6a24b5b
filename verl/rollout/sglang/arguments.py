"""What SGLang is started with: its arguments and its environment, from our settings and from what is installed."""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

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
# SGLang keeps a few places of the context to itself.
CONTEXT_MARGIN = 8


@dataclass(frozen=True)
class SGLangSettings:
    """What a replica of ours is; ``extra``: further arguments of SGLang, which stand over ours.

    model_path: a folder in Hugging Face format, or a hub name. dtype: as torch names it. device: cpu or cuda.
    gpu_memory_utilization: share of the memory that is free when the engine starts.
    """

    model_path: str
    device: str
    dtype: str
    max_model_len: int
    max_num_seqs: int = 1024
    max_prefill_tokens: int = 8192
    tensor_parallel: int = 1
    gpu_memory_utilization: float = 0.5
    free_cache_engine: bool = True
    enforce_eager: bool = False
    load_format: str = "dummy"
    trust_remote_code: bool = False
    seed: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def sleeps(self) -> bool:
        return self.device == "cuda" and self.free_cache_engine


@dataclass(frozen=True)
class Part:
    """One process of a replica: there is one on each node that the replica spans.

    meeting: "host:port" where the processes meet. address: of this one's node; interface: that has it. gpus: that the
    process may see, as CUDA_VISIBLE_DEVICES names them; None: those that it inherits.
    """

    node_rank: int = 0
    nnodes: int = 1
    meeting: str | None = None
    address: str | None = None
    interface: str | None = None
    gpus: tuple[str, ...] | None = None


WHOLE = Part()


def arguments_of(settings: SGLangSettings, part: Part = WHOLE) -> dict[str, Any]:
    arguments = {
        "model_path": settings.model_path,
        "trust_remote_code": settings.trust_remote_code,
        "skip_tokenizer_init": True,
        "device": settings.device,
        "dtype": settings.dtype,
        "load_format": settings.load_format,
        "tp_size": settings.tensor_parallel,
        "context_length": settings.max_model_len + CONTEXT_MARGIN,
        "max_running_requests": settings.max_num_seqs,
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
    else:
        arguments["mem_fraction_static"] = settings.gpu_memory_utilization
    if part.meeting:
        arguments |= {"nnodes": part.nnodes, "node_rank": part.node_rank, "dist_init_addr": part.meeting}
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


def environment_of(settings: SGLangSettings, inherited: Mapping[str, str], part: Part = WHOLE) -> dict[str, str]:
    """Of the processes of a part. Left out: what a launcher of the trainer's, or its allocator, set for itself."""
    left_out = {"TORCHELASTIC_USE_AGENT_STORE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LOCAL_RANK", "RANK"}
    environment = {name: value for name, value in inherited.items() if name not in left_out}
    environment |= {
        "PYTHONUNBUFFERED": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # by CONTEXT_MARGIN; no position that far is ever computed
        "TOKENIZERS_PARALLELISM": "false",
        "SGLANG_BLOCK_NONZERO_RANK_CHILDREN": "0",
    }
    if part.address and part.interface:
        environment["SGLANG_HOST_IP"] = part.address
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, part.interface)
    if part.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(part.gpus)
    if settings.device == "cpu":
        environment["SGLANG_USE_CPU_ENGINE"] = "1"
        environment.setdefault("OMP_WAIT_POLICY", "passive")
        if settings.tensor_parallel > 1:  # a rank for each group of cores, where there is no NUMA node for each
            groups = _core_groups(settings.tensor_parallel // part.nnodes)
            environment.setdefault("SGLANG_CPU_OMP_THREADS_BIND", "|".join(groups * part.nnodes))
        return environment
    if not installed("flashinfer-python"):
        environment["SGLANG_IS_FLASHINFER_AVAILABLE"] = "false"
    folders = [*_cuda_library_folders(), inherited.get("LD_LIBRARY_PATH", "")]
    environment["LD_LIBRARY_PATH"] = ":".join(folder for folder in folders if folder)
    return environment


def _core_groups(count: int) -> list[str]:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return [str(cores[index % len(cores)]) for index in range(count)]
    share = len(cores) // count
    return [",".join(map(str, cores[index * share : (index + 1) * share])) for index in range(count)]


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


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
