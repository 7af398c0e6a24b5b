"""Which ranks hold which replica."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ReplicaRanks:
    """A tensor-parallel group on ``size`` consecutive ranks from ``first`` on, ``per_node`` of them on each node."""

    index: int
    first: int
    size: int
    per_node: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.size)

    @property
    def hosts(self) -> list[int]:
        """The ranks that hold a process of the engine, one on each node; the first takes the requests."""
        return list(self.ranks[:: self.per_node])

    def host_of(self, rank: int) -> int:
        """The rank on the same node that holds the process."""
        return rank - (rank - self.first) % self.per_node

    @property
    def name(self) -> str:
        last = self.first + self.size - 1
        return (
            f"replica {self.index} (rank {self.first})"
            if self.size == 1
            else (f"replica {self.index} (ranks {self.first} to {last})")
        )


def replicas_of(world_size: int, devices_per_node: int, tensor_parallel: int) -> list[ReplicaRanks]:
    """tensor_parallel divides devices_per_node or is a multiple of it, and divides world_size."""
    per_node = min(tensor_parallel, devices_per_node)
    return [
        ReplicaRanks(index, index * tensor_parallel, tensor_parallel, per_node)
        for index in range(world_size // tensor_parallel)
    ]
