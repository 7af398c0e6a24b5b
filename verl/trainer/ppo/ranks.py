"""The objects that a rank holds when ranks are processes: factories for ``verl.cluster.ray.rank.Rank.make``."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from verl.algorithms.batches import balanced_partition
from verl.cluster.network import free_port, host_port, interface_of
from verl.cluster.ray.group import Shares, even_shares
from verl.config.sections.models import Config
from verl.data.tokenizer import load_tokenizer
from verl.memory.gpu_balance import check_balance, disabled_by_user, environment_for_engine, read_gpus
from verl.plan import EnginePlan, RunPlan
from verl.rollout.client.backend import Backend
from verl.rollout.engines.registry import ADAPTERS
from verl.rollout.processes.adapter import NodeShare
from verl.rollout.processes.subprocess_backend import SubprocessBackend, weight_sender
from verl.rollout.replicas.embedded import EmbeddedBackend
from verl.rollout.replicas.host import EngineHost, Place
from verl.rollout.replicas.layout import replicas_of
from verl.trainer.ppo.engines import embedded_engine, engine_settings
from verl.trainer.ppo.metrics import sequence_lengths
from verl.trainer.ppo.worker import PPOWorker

if TYPE_CHECKING:
    from verl.cluster.ray.rank import RankContext

WORKER, HOST = "worker", "host"  # names of a rank's objects


def make_worker(context: RankContext, config: Config, plan: RunPlan) -> PPOWorker:
    return PPOWorker(config, plan)


def make_host(context: RankContext, plan: EnginePlan, logs: Path) -> EngineHost:
    """This rank's share of a rollout replica. logs: folder for the engines' output, on each node."""
    replicas = replicas_of(plan.world_size, plan.devices_per_node, plan.tensor_parallel)
    (replica,) = [replica for replica in replicas if context.rank in replica.ranks]
    interface = interface_of(context.address)

    if plan.name == "hf":
        sender = None
    else:
        adapter, settings = ADAPTERS[plan.name], engine_settings(plan)
        sender = weight_sender(settings, 1, plan.bucket_megabytes << 20)

    def place() -> Place:
        rendezvous = host_port(context.address, free_port(context.address))
        return Place(sender.endpoint if sender else None, context.gpu, rendezvous)

    starts, warnings = itertools.count(1), list[str]()

    def start(places: Sequence[Place]) -> Backend:
        number = next(starts)
        warnings.clear()
        if plan.name == "hf":
            tokenizer = load_tokenizer(plan.model.tokenizer_path, plan.model.trust_remote_code)
            return EmbeddedBackend(embedded_engine(plan, context.objects[WORKER].engines["actor"], tokenizer))
        node = replica.hosts.index(context.rank)
        first = node * replica.per_node  # tensor-parallel rank
        of_node = range(first, first + replica.per_node)
        gpus = tuple(gpu for rank in of_node if (gpu := places[rank].gpu) is not None)
        if len(gpus) > 1 and adapter.wants_even_memory:
            readings = read_gpus(range(len(gpus)), ",".join(gpus))
            if warning := check_balance(readings, disabled=disabled_by_user(os.environ)):
                warnings.append(warning)
        name = f"{plan.name}-{replica.index}"
        name += f"-node-{node}" if len(replica.hosts) > 1 else ""
        name += f"-start-{number}" if number > 1 else ""  # the log of the earlier start is kept
        return SubprocessBackend(
            adapter,
            settings,
            log=logs / f"{name}.log",
            environment=environment_for_engine(os.environ),
            part=NodeShare(node, len(replica.hosts), places[0].rendezvous, context.address, interface, gpus or None),
            sender=sender,
            senders={rank: end for rank in of_node if (end := places[rank].sender) is not None},
        )

    return EngineHost(
        context.rank,
        replica,
        place,
        start,
        sender=sender,
        weights=lambda: context.objects[WORKER].weights(),
        loaded=lambda: context.objects[WORKER].borrowed("actor"),
        warnings=warnings,
    )


def token_shares(balance: bool) -> Shares:
    """How ranks share the rows of a table: so that their tokens are balanced, or in order. Does not change which rows
    make an optimizer step."""

    def balanced(table: pa.Table, ranks: int) -> list[np.ndarray]:
        return balanced_partition(sequence_lengths(table), ranks)

    return balanced if balance else even_shares
