"""Which device of which node is whose: a seat for each rank.

One placement group for each node, with one bundle for each device; ranks are numbered by node, so those of a node
follow each other. The driver's node comes first, the others by address.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import ray
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.errors import UserError

T = TypeVar("T")

SETTLING = 5.0  # seconds until all nodes of a cluster show, and what an earlier run held is free again
LOOK_EVERY = 0.25


@dataclass(frozen=True)
class Seat:
    """Where one rank lives. node: number of the machine; bundle: of the group, the rank's own."""

    rank: int
    node: int
    node_id: str
    address: str
    hostname: str
    group: PlacementGroup
    bundle: int

    @property
    def local_rank(self) -> int:
        """Among the ranks of its node."""
        return self.bundle


@dataclass(frozen=True)
class Node:
    """A machine of the cluster. total, free: of its CPUs and GPUs."""

    node_id: str
    address: str
    hostname: str
    total: dict[str, float]
    free: dict[str, float]

    def has(self, needed: dict[str, float]) -> bool:
        return all(self.total.get(name, 0) >= count for name, count in needed.items())

    def can_give(self, needed: dict[str, float]) -> bool:
        return all(self.free.get(name, 0) >= count for name, count in needed.items())


def check_resources(nnodes: int, devices_per_node: int, device: str) -> None:
    """Raises UserError where the cluster cannot hold the run now."""
    _fitting_nodes(nnodes, devices_per_node, device, SETTLING)


def place(nnodes: int, devices_per_node: int, device: str, timeout: float) -> list[Seat]:
    """Seats of all ranks, which nobody else is given until ``remove``. Raises UserError after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    nodes = _fitting_nodes(nnodes, devices_per_node, device, timeout)
    groups: list[PlacementGroup] = []
    try:
        for node in nodes:
            groups.append(
                placement_group(
                    [_bundle(device)] * devices_per_node,
                    strategy="STRICT_PACK",
                    bundle_label_selector=[{"ray.io/node-id": node.node_id}] * devices_per_node,
                )
            )
        for group in groups:
            if not group.wait(max(deadline - time.monotonic(), 1.0)):
                raise UserError(_refusal(nnodes, devices_per_node, device, f"Ray gave no seats in {timeout:.0f} s"))
    except BaseException:
        _remove(groups)
        raise
    return [
        Seat(
            number * devices_per_node + local_rank,
            number,
            node.node_id,
            node.address,
            node.hostname,
            group,
            local_rank,
        )
        for number, (node, group) in enumerate(zip(nodes, groups, strict=True))
        for local_rank in range(devices_per_node)
    ]


def ask_nodes(seats: Sequence[Seat], question: Callable[[], T], timeout: float) -> list[tuple[Seat, T]]:
    """The first seat of each node, and what ``question`` answers in a process there. timeout: seconds."""
    first = [seat for seat in seats if seat.local_rank == 0]
    task = ray.remote(question)
    answers = [
        task.options(  # type: ignore[attr-defined]
            num_cpus=0, scheduling_strategy=PlacementGroupSchedulingStrategy(seat.group, seat.bundle)
        ).remote()
        for seat in first
    ]
    try:
        return list(zip(first, ray.get(answers, timeout=timeout), strict=True))
    except RayError as error:
        nodes = ", ".join(f"{seat.hostname} ({seat.address})" for seat in first)
        raise UserError(f"no process of this run answered on {nodes}: {error}") from error


def remove(seats: Sequence[Seat]) -> None:
    """Give the seats back; this ends what still runs on them."""
    _remove(list({seat.group.id: seat.group for seat in seats}.values()))


def _remove(groups: Sequence[PlacementGroup]) -> None:
    for group in groups:
        remove_placement_group(group)


def _bundle(device: str) -> dict[str, float]:
    return {"CPU": 1, "GPU": 1} if device == "cuda" else {"CPU": 1}


def _needed(devices_per_node: int, device: str) -> dict[str, float]:
    return {name: count * devices_per_node for name, count in _bundle(device).items()}


def _fitting_nodes(nnodes: int, devices_per_node: int, device: str, patience: float) -> list[Node]:
    """The first nodes that can hold the ranks now, waiting for them for ``patience`` seconds."""
    needed = _needed(devices_per_node, device)
    deadline = time.monotonic() + patience
    while True:
        fitting = [node for node in nodes_in_order() if node.can_give(needed)]
        if len(fitting) >= nnodes:
            return fitting[:nnodes]
        if time.monotonic() > deadline:
            raise UserError(_refusal(nnodes, devices_per_node, device, _reason(nnodes, needed)))
        time.sleep(LOOK_EVERY)


def nodes_in_order() -> list[Node]:
    """The nodes that are alive: the driver's, then the others by address."""
    free = ray._private.state.available_resources_per_node()
    here = ray.get_runtime_context().get_node_id()
    nodes = [
        Node(
            node["NodeID"],
            node["NodeManagerAddress"],
            node["NodeManagerHostname"],
            node["Resources"],
            free.get(node["NodeID"], {}),
        )
        for node in ray.nodes()
        if node["Alive"]
    ]
    return sorted(nodes, key=lambda node: (node.node_id != here, _number(node.address), node.node_id))


def _number(address: str) -> tuple[int, int]:
    parsed = ipaddress.ip_address(address)
    return parsed.version, int(parsed)


def _reason(nnodes: int, needed: dict[str, float]) -> str:
    nodes = nodes_in_order()
    if len(nodes) < nnodes:
        return f"the Ray cluster has {len(nodes)} node{'s' if len(nodes) != 1 else ''}"
    able = [node for node in nodes if node.has(needed)]
    if len(able) < nnodes:
        return "too few nodes have them" if nnodes > 1 else "no node has them"
    busy = [node.hostname for node in able if not node.can_give(needed)]
    return f"on {', '.join(busy)} others hold some of them (another run, perhaps)"


def _refusal(nnodes: int, devices_per_node: int, device: str, reason: str) -> str:
    kind = "GPU" if device == "cuda" else "CPU rank"
    count = f"{devices_per_node} {kind}{'s' if devices_per_node != 1 else ''}"
    where = f"each of {nnodes} machines" if nnodes > 1 else "one machine"
    rows: list[tuple[str, ...]] = [("address", "host", "CPUs free/all", "GPUs free/all")]
    for node in nodes_in_order():
        rows.append((node.address, node.hostname, *(_share(node, name) for name in ("CPU", "GPU"))))
    needed = _needed(devices_per_node, device)
    rows.append(("asked of each", "", f"{needed['CPU']:g}", f"{needed.get('GPU', 0):g}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join(
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    return (
        f"trainer.nnodes={nnodes} and trainer.n_gpus_per_node={devices_per_node} ask for {count} on {where}, "
        f"but {reason}:\n{table}\n"
        "Set the two keys to what is there, or start Ray on more machines (docs/ray.md)."
    )


def _share(node: Node, name: str) -> str:
    return f"{node.free.get(name, 0):g}/{node.total.get(name, 0):g}"
