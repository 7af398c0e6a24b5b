"""The models and the rollout engine of a run whose ranks are actors on a Ray cluster, one on each device."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from verl.cluster.ray.group import RayRanks, RayWorkerGroup
from verl.cluster.ray.placement import Seat, ask_nodes, check_resources, place, remove
from verl.cluster.ray.start import RaySettings, connected
from verl.config.sections.models import Config
from verl.errors import UserError
from verl.machine import HostMemory, host_memory
from verl.plan import RunPlan
from verl.rollout.client.engine import NO_WEIGHTS
from verl.rollout.router.router import Router
from verl.tracking import Progress, Trackers
from verl.trainer.ppo.phases import put_to_sleep
from verl.trainer.ppo.ranks import WORKER, token_shares
from verl.trainer.ppo.replicas import Replicas
from verl.trainer.ppo.trainer import Trained
from verl.trainer.ppo.worker import READS

PLACE_TIMEOUT, ANSWER_TIMEOUT = 60.0, 300.0  # seconds
# What the ranks' libraries read, and a driver's user sets; the ranks' own environment is that of their node's Ray.
PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "SGL", "VERL_", "HF_", "TOKENIZERS_", "OMP_", "CUDA_LAUNCH_")
SECRET = ("_TOKEN", "_KEY")  # stays: what Ray sends is not encrypted


def seats_of_ranks(stack: ExitStack, config: Config, plan: RunPlan) -> list[Seat]:
    """A device for each rank, until ``stack`` is closed."""
    init = dict(config.ray_kwargs.ray_init)
    settings = RaySettings(os.environ.get("RAY_ADDRESS"), init, plan.devices_per_node)
    stack.enter_context(connected(settings, lambda text: print(text, flush=True)))
    check_resources(plan.nnodes, plan.devices_per_node, plan.device)
    seats = place(plan.nnodes, plan.devices_per_node, plan.device, PLACE_TIMEOUT)
    stack.callback(remove, seats)
    return seats


def host_memories(seats: Sequence[Seat]) -> list[tuple[str, HostMemory]]:
    """Of each machine, by its name, in the order of the ranks."""
    return [(seat.hostname, memory) for seat, memory in ask_nodes(seats, host_memory, ANSWER_TIMEOUT)]


def build_on_ray(
    stack: ExitStack,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    seats: Sequence[Seat],
    folder: Path,
    trackers: Trackers,
) -> Trained:
    """``stack`` closes what is started here; an error that it meets becomes the ranks' own, if they have failed."""
    ranks, replicas = start_ranks(stack, config, plan, tokenizer, seats, folder, trackers.progress)
    if plan.engine == "hf":  # it borrows the actor's module
        workers = _make_workers(ranks, config, plan)
        rollout = start_replicas(stack, replicas)
    else:
        rollout = start_replicas(stack, replicas)
        workers = _make_workers(ranks, config, plan)
    stack.push(ranks.end)
    return Trained(workers, lambda: replicas.weights, rollout, abandon=ranks.close)


def start_ranks(
    stack: ExitStack,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    seats: Sequence[Seat],
    folder: Path,
    progress: Progress,
    no_weights: str | None = NO_WEIGHTS,
) -> tuple[RayRanks, Replicas]:
    """The ranks, each with its part of a replica that is not started yet. stack: as for ``build_on_ray``; no_weights:
    as for ``start_engine``."""
    logs = folder / "ranks"
    replicas: Replicas | None = None

    def fail(error: UserError) -> None:
        if replicas is not None:
            replicas.fail(error)

    hosts = sorted({seat.hostname for seat in seats})
    progress.note(f"starting {len(seats)} ranks on {', '.join(hosts)} (their output: {logs})")
    environment = {
        name: value for name, value in os.environ.items() if name.startswith(PASSED_ON) and not name.endswith(SECRET)
    }
    ranks = RayRanks(
        seats,
        plan.device,
        logs=logs,
        timeout=config.trainer.worker_timeout,
        environment=environment,
        on_failure=fail,
    )
    stack.push(ranks.explain)
    stack.callback(ranks.close)
    if plan.nnodes > 1 and (plan.save_freq > 0 or list(folder.glob("global_step_*"))):
        check_shared(ranks, folder)
    replicas = Replicas(ranks, config, plan, tokenizer, folder / "rollout", progress.note, no_weights)
    stack.callback(replicas.close)
    return ranks, replicas


def start_replicas(stack: ExitStack, replicas: Replicas) -> Router:
    """Asleep, as far as they can."""
    rollout = replicas.start()
    stack.callback(lambda: asyncio.run(rollout.close()))
    put_to_sleep(rollout)
    return rollout


def _make_workers(ranks: RayRanks, config: Config, plan: RunPlan) -> RayWorkerGroup:
    shares = token_shares(config.trainer.balance_batch)
    return ranks.make(WORKER, "verl.trainer.ppo.ranks:make_worker", config, plan, shares=shares, reads=READS)


def check_shared(ranks: RayRanks, folder: Path) -> None:
    """Each rank writes its part of a checkpoint, and reads any part."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / f".seen-by-all-nodes-{secrets.token_hex(8)}"
    mark.touch()
    try:
        seen = ranks.seen_by(mark.absolute())
    finally:
        mark.unlink()
    if blind := [ranks.seats[rank] for rank, sees in enumerate(seen) if not sees]:
        nodes = sorted({f"{seat.hostname} ({seat.address})" for seat in blind})
        raise UserError(
            f"trainer.default_local_dir={folder} is not the same folder on {', '.join(nodes)}: every node writes its "
            "part of a checkpoint there. Name a folder that all nodes share, or set trainer.save_freq=-1"
        )
