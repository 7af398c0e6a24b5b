"""What the trainer has to know of an inference engine that it runs in a process of its own: what a replica of it is
(``EngineSettings``, ``Part``), and how that is told to this engine (``Adapter``). No engine is imported here."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from verl.rollout.contract.base import Capabilities, MemoryTag, PromptWindow


@dataclass(frozen=True)
class EngineSettings:
    """What a replica of ours is; ``extra``: further arguments of the engine, which stand over ours.

    model_path: a folder in Hugging Face format, or a hub name. override_config: values over its config.json's.
    dtype: as torch names it. device: cpu or cuda. gpu_memory_utilization: as the engine takes it.
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
    override_config: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 1
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def window(self) -> PromptWindow:
        return PromptWindow.of(self.max_prefill_tokens, self.max_num_seqs)

    @property
    def sleeps(self) -> bool:
        return self.device == "cuda" and self.free_cache_engine


@dataclass(frozen=True)
class NodeShare:
    """One process of a replica: there is one on each node that the replica spans.

    rendezvous: "host:port" where the processes meet. address, interface: of this process's node. gpus: that the process
    may see, as in CUDA_VISIBLE_DEVICES; None: those that it inherits.
    """

    node_rank: int = 0
    nnodes: int = 1
    rendezvous: str | None = None
    address: str | None = None
    interface: str | None = None
    gpus: tuple[str, ...] | None = None


WHOLE = NodeShare()


@dataclass(frozen=True)
class Adapter:
    """An engine, to the trainer.

    name: as rollout.name and engine_kwargs have it. title: in messages. server: the module that its process runs.
    distributions: of Python, any of which brings it.
    own_keys: arguments of the engine that other keys of ours decide -> that key.
    spans_nodes: whether one replica may. no_min_new_tokens: why it cannot; None: it can.
    wants_even_memory: whether it gives every GPU of a replica as little memory as the fullest one has free.
    pass_has_all: whether max_num_batched_tokens has to have room for a token of each of max_num_seqs responses.
    capabilities, keeps_weights: as a ``Backend`` has them. arguments: that the server gets; environment: of the
    processes of a part, from the inherited one. describe: what the server told of itself, for the user.
    milestones: of its start: regular expression of a line of its log -> what it is doing from then on.
    """

    name: str
    title: str
    server: str
    distributions: tuple[str, ...]
    own_keys: Mapping[str, str]
    spans_nodes: bool
    no_min_new_tokens: str | None
    wants_even_memory: bool
    pass_has_all: bool
    capabilities: Callable[[EngineSettings], Capabilities]
    keeps_weights: Callable[[EngineSettings], bool]
    arguments: Callable[[EngineSettings, NodeShare], dict[str, Any]]
    environment: Callable[[EngineSettings, Mapping[str, str], NodeShare], dict[str, str]]
    describe: Callable[[Mapping[str, Any]], str]
    milestones: Mapping[str, str] = field(default_factory=dict)

    @property
    def installed(self) -> bool:
        return any(map(installed, self.distributions))


def installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


# ---- what adapters share

SLEEP: frozenset[MemoryTag] = frozenset({"weights", "kv_cache"})

# What a launcher of the trainer's, or its allocator, set for itself.
_TRAINERS_OWN = {"TORCHELASTIC_USE_AGENT_STORE", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "LOCAL_RANK", "RANK"}


def common_environment(settings: EngineSettings, inherited: Mapping[str, str], part: NodeShare) -> dict[str, str]:
    environment = {name: value for name, value in inherited.items() if name not in _TRAINERS_OWN}
    environment |= {"PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if part.address and part.interface:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            environment.setdefault(name, part.interface)
    if part.gpus is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(part.gpus)
    if settings.device == "cpu":
        environment.setdefault("OMP_WAIT_POLICY", "passive")
    return environment


def core_groups(count: int) -> list[str]:
    """This process's cores, a group for each of ``count`` ranks."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < count:
        return [str(cores[index % len(cores)]) for index in range(count)]
    share = len(cores) // count
    return [",".join(map(str, cores[index * share : (index + 1) * share])) for index in range(count)]
