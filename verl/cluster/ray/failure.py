"""One message for what ended the ranks: who, where, what it was doing, its last lines, and where the others wait."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from verl.cluster.ray.rank import Answer
from verl.errors import UserError, indented, last_lines

if TYPE_CHECKING:
    from verl.cluster.ray.group import RayRanks

ANSWER_TIMEOUT = 10.0  # seconds, of a rank that hangs or a node that is gone
VERDICT_TIMEOUT = 10.0  # seconds in which Ray may find out that the node of a rank which cannot be reached is gone
SHOWN = 4  # ranks whose stacks are shown


def lost(ranks: RayRanks, rank: int, what: str, error: RayError) -> str:
    doing = f" while it was in {what!r}" if what else ""
    return (
        f"{who(ranks, rank)} is gone{doing}: {_reason(ranks, rank, error)}\n"
        + _output(ranks, rank)
        + _others(ranks, [other for other in range(ranks.world_size) if other != rank])
    )


def raised(ranks: RayRanks, rank: int, what: str, answer: Answer, waiting: Sequence[int]) -> str:
    memory = (
        ". The device's memory is full: smaller micro-batches, param_offload and optimizer_offload, or a lower "
        "actor_rollout_ref.rollout.gpu_memory_utilization leave more of it"
        if "OutOfMemoryError" in str(answer.value)
        else ""
    )
    told = f"{who(ranks, rank)} failed in {what!r}: {answer.value}{memory}"
    if isinstance(answer.value, UserError):  # says what to do
        return told
    return f"{told}\n{indented(answer.trace)}\n" + _others(ranks, waiting)


def hung(ranks: RayRanks, what: str, waiting: Sequence[int], timeout: float) -> str:
    names = ", ".join(who(ranks, rank) for rank in waiting[:SHOWN]) + (", ..." if len(waiting) > SHOWN else "")
    limit, advice = f"{timeout:g} seconds", ""
    if timeout == ranks.timeout:
        limit = f"trainer.worker_timeout={limit}"
        advice = " If such a call may take longer, set it higher."
    return (
        f"{names} did not finish {what!r} within {limit}.{advice} Where they are:\n{_stacks(ranks, waiting)}"
        + _others(ranks, _rest(ranks, waiting))
    )


def answers(ranks: RayRanks, rank: int) -> bool:
    """Whether the rank's process says anything at all."""
    try:
        ray.get(ranks.actors[rank].doing.remote(), timeout=ANSWER_TIMEOUT)
        return True
    except RayError:
        return False


def could_not_start(ranks: RayRanks, error: RayError, timeout: float) -> str:
    if isinstance(error, GetTimeoutError):
        return f"the ranks did not come together within {timeout:.0f} s. Their output is in {ranks.logs}"
    for rank, actor in enumerate(ranks.actors):
        try:
            ray.get(actor.doing.remote(), timeout=1.0)
        except RayActorError as found:
            return f"{who(ranks, rank)} could not be started: {_cause(found)}\n" + _output(ranks, rank)
        except RayError:
            continue
    return f"the ranks could not come together: {_cause(error)}. Their output is in {ranks.logs}"


def who(ranks: RayRanks, rank: int) -> str:
    seat = ranks.seats[rank]
    pid = f", pid {ranks.pids[rank]}" if rank < len(ranks.pids) else ""
    return f"rank {rank} (node {seat.hostname}, {seat.address}{pid})"


def _reason(ranks: RayRanks, rank: int, error: RayError) -> str:
    seat = ranks.seats[rank]
    deadline = time.monotonic() + VERDICT_TIMEOUT
    while isinstance(error, ActorUnavailableError) and _is_alive(seat.node_id) and time.monotonic() < deadline:
        time.sleep(0.5)
    if not _is_alive(seat.node_id):
        peers = [other.rank for other in ranks.seats if other.node_id == seat.node_id]
        names = ", ".join(map(str, peers))
        return f"its node does not answer any more (it had rank{'s' if len(peers) > 1 else ''} {names})"
    return _cause(error)


def _cause(error: Exception) -> str:
    """What Ray knows of it, without the identifiers that it lists."""
    text = str(error)
    if "memory pressure" in text or "OutOfMemory" in text or "memory monitor" in text:
        return "Ray ended it, as the node's memory was nearly full"
    if isinstance(error, ActorUnavailableError):
        return "it can no longer be reached"
    if "SIGKILL" in text and "OOM" in text:
        return "its process ended, killed perhaps, by the system for want of memory or by somebody"
    cause = getattr(error, "cause", None)
    if isinstance(cause, Exception):  # raised in a method of ours
        return f"{type(cause).__name__}: {cause}"[:600]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if not re.match(r"(class_name|actor_id|pid|namespace|ip|name|ray_namespace):", line)]
    return " ".join(told)[:600] or type(error).__name__


def _is_alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _rest(ranks: RayRanks, left_out: Sequence[int]) -> list[int]:
    return [rank for rank in range(ranks.world_size) if rank not in left_out]


def _others(ranks: RayRanks, waiting: Sequence[int]) -> str:
    return f"The others:\n{_stacks(ranks, waiting)}" if waiting else ""


def _stacks(ranks: RayRanks, chosen: Sequence[int]) -> str:
    asked = {rank: ranks.actors[rank].doing.remote() for rank in list(chosen)[:SHOWN]}
    lines = []
    for rank, ref in asked.items():
        try:
            answer = ray.get(ref, timeout=ANSWER_TIMEOUT)
        except GetTimeoutError:
            answer = f"did not tell within {ANSWER_TIMEOUT:.0f} s"
        except RayError:
            answer = "is gone, too"
        lines.append(f"  rank {rank} {answer}")
    if len(chosen) > SHOWN:
        lines.append(f"  and {len(chosen) - SHOWN} more")
    return "\n".join(lines) + "\n"


def _output(ranks: RayRanks, rank: int) -> str:
    log = ranks.log_of(rank)
    lines = _lines_there(ranks, rank, log)
    if lines is None:
        return f"Its output, {log} on that node, could not be read.\n"
    return f"Its output is in {log} on that node; the last of it:\n{indented(chr(10).join(lines))}\n"


def _lines_there(ranks: RayRanks, rank: int, log: Path) -> list[str] | None:
    seat = ranks.seats[rank]
    try:
        if seat.node_id == ray.get_runtime_context().get_node_id():
            return last_lines(log)
        if not _is_alive(seat.node_id):
            return None
        where = NodeAffinitySchedulingStrategy(seat.node_id, soft=False)
        read = ray.remote(last_lines).options(num_cpus=0, scheduling_strategy=where).remote(log)
        return ray.get(read, timeout=ANSWER_TIMEOUT)
    except (OSError, RayError):
        return None
