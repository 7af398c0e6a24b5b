"""The models and the rollout engine of a run whose ranks are actors on a Ray cluster, one on each device."""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from verl.cluster.ray.group import RayRanks, RayWorkerGroup
from verl.cluster.ray.placement import Seat, ask_nodes, check_resources, place, remove
from verl.cluster.ray.start import RaySettings, connected
from verl.config.sections.models import Config, RayKwargsConfig
from verl.errors import UserError
from verl.machine import HostMemory, host_memory
from verl.plan import EnginePlan, Placement, RunPlan, engine_of
from verl.rollout.client.engine import NO_WEIGHTS
from verl.rollout.loop import EventLoop
from verl.rollout.router.router import Router
from verl.tracking import Progress
from verl.trainer.ppo.phases import put_to_sleep
from verl.trainer.ppo.ranks import WORKER, token_shares
from verl.trainer.ppo.replicas import Replicas
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.worker import reads_of

PLACE_TIMEOUT, ANSWER_TIMEOUT = 60.0, 300.0  # seconds
# Environment variables that the driver passes to the ranks. Everything else comes from Ray on the rank's node.
PASSED_ON = ("NCCL_", "GLOO_", "TORCH_", "PYTORCH_", "SGL", "VERL_", "HF_", "TOKENIZERS_", "OMP_", "CUDA_LAUNCH_")
SECRET = ("_TOKEN", "_KEY")  # not passed on: Ray sends variables unencrypted


def seats_of_ranks(stack: ExitStack, ray_kwargs: RayKwargsConfig, plan: Placement) -> list[Seat]:
    """A device for each rank. ``stack`` gives them back when it closes."""
    init = dict(ray_kwargs.ray_init)
    settings = RaySettings(os.environ.get("RAY_ADDRESS"), init, plan.devices_per_node)
    stack.enter_context(connected(settings, lambda text: print(text, flush=True)))
    check_resources(plan.nnodes, plan.devices_per_node, plan.device)
    seats = place(plan.nnodes, plan.devices_per_node, plan.device, PLACE_TIMEOUT)
    stack.callback(remove, seats)
    return seats


def host_memories(seats: Sequence[Seat]) -> list[tuple[str, HostMemory]]:
    """(host name, host memory) of each machine, in the order of the ranks."""
    return [(seat.hostname, memory) for seat, memory in ask_nodes(seats, host_memory, ANSWER_TIMEOUT)]


def build_on_ray(
    stack: ExitStack,
    loop: EventLoop,
    config: Config,
    plan: RunPlan,
    tokenizer: PreTrainedTokenizerBase,
    seats: Sequence[Seat],
    folder: Path,
    progress: Progress,
) -> Runtime:
    """``stack`` closes what is started here. If the ranks have failed, it turns any error into theirs."""
    ranks, replicas = start_ranks(
        stack,
        engine_of(config, plan),
        tokenizer,
        seats,
        folder,
        progress,
        timeout=config.trainer.worker_timeout,
        shares_folder=plan.save_freq > 0 or bool(list(folder.glob("global_step_*"))),
    )
    if plan.engine == "hf":  # it borrows the actor's module
        workers = _make_workers(ranks, config, plan)
        rollout = start_replicas(stack, replicas, loop)
    else:
        rollout = start_replicas(stack, replicas, loop)
        workers = _make_workers(ranks, config, plan)
    stack.push(ranks.end)
    return Runtime(loop, workers, rollout, lambda: replicas.weights, progress, abandon=ranks.close)


def start_ranks(
    stack: ExitStack,
    plan: EnginePlan,
    tokenizer: PreTrainedTokenizerBase,
    seats: Sequence[Seat],
    folder: Path,
    progress: Progress,
    *,
    timeout: float,
    shares_folder: bool = False,
    no_weights: str | None = NO_WEIGHTS,
) -> tuple[RayRanks, Replicas]:
    """The ranks, each with its share of a replica. The replicas are not started yet.

    stack: as in ``build_on_ray``. timeout: seconds that a call to the ranks may take. shares_folder: whether all nodes
    must see ``folder``. no_weights: as in ``start_engine``.
    """
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
        timeout=timeout,
        environment=environment,
        on_failure=fail,
    )
    stack.push(ranks.explain)
    stack.callback(ranks.close)
    if plan.nnodes > 1 and shares_folder:
        check_shared(ranks, folder)
    replicas = Replicas(ranks, plan, tokenizer, folder / "rollout", progress.note, no_weights)
    stack.callback(replicas.close)
    return ranks, replicas


def start_replicas(stack: ExitStack, replicas: Replicas, loop: EventLoop) -> Router:
    """Replicas that sleep, if they can sleep."""
    rollout = replicas.start()
    stack.callback(lambda: loop.run(rollout.close()))
    put_to_sleep(rollout, loop)
    return rollout


def _make_workers(ranks: RayRanks, config: Config, plan: RunPlan) -> RayWorkerGroup:
    shares = token_shares(config.trainer.balance_batch)
    return ranks.make(WORKER, "verl.trainer.ppo.ranks:make_worker", config, plan, shares=shares, reads=reads_of(config))


def check_shared(ranks: RayRanks, folder: Path) -> None:
    """UserError if a node does not see the same folder. Each rank writes its shard of a checkpoint and reads any."""
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
            "shards of a checkpoint there. Name a folder that all nodes share, or set trainer.save_freq=-1"
        )
