"""The rollout engine of a run whose ranks are processes: a replica on each group of ranks, behind one router."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from verl.cluster.ray.group import RayRanks
from verl.errors import UserError
from verl.plan import EnginePlan
from verl.rollout.client.backend import EngineDied
from verl.rollout.client.engine import NO_WEIGHTS, ClientEngine
from verl.rollout.processes.subprocess_backend import START_TIMEOUT
from verl.rollout.replicas.layout import ReplicaRanks, replicas_of
from verl.rollout.replicas.remote import RemoteBackend
from verl.rollout.replicas.weights import WeightsOnRanks
from verl.rollout.router.router import Replica, Router
from verl.trainer.ppo.engines import client_of
from verl.trainer.ppo.ranks import HOST

Say = Callable[[str], None]


class Replicas:
    """Starts the replicas, and restarts one that died. no_weights: as in ``verl.trainer.ppo.engines.start_engine``."""

    def __init__(
        self,
        ranks: RayRanks,
        plan: EnginePlan,
        tokenizer: PreTrainedTokenizerBase,
        logs: Path,
        note: Say,
        no_weights: str | None = NO_WEIGHTS,
    ):
        self._no_weights = no_weights
        self._ranks, self._plan, self._tokenizer = ranks, plan, tokenizer
        self._say = note
        self._replicas = replicas_of(plan.world_size, plan.devices_per_node, plan.tensor_parallel)
        self._hosts = ranks.make(HOST, "verl.trainer.ppo.ranks:make_host", plan, logs)
        self.weights = WeightsOnRanks(self._hosts, self._replicas)
        self._current: dict[str, RemoteBackend] = {}  # by the replica's name

    def _note(self, text: str) -> None:
        """Prints a note, unless the ranks have failed: then it would only repeat the failure."""
        if self._ranks.failure is None:
            self._say(text)

    def start(self) -> Router:
        places = self._hosts.call("place").result()
        facts = self._hosts.call_within(START_TIMEOUT + 60, "start", places).result()
        if told := facts[0]["describe"]:
            copies = f", {len(self._replicas)} replicas of it" if len(self._replicas) > 1 else ""
            self._note(f"{told}{copies}")
        members = [
            Replica(replica.name, self._client(replica, {rank: facts[rank] for rank in replica.hosts}))
            for replica in self._replicas
        ]
        return Router(
            members,
            revive=None if self._plan.name == "hf" else self._again,  # it dies only with its rank
            save=lambda stream, version: stream,  # the ranks can send the weights any number of times
            revivals=self._plan.restarts,
            note=self._note,
        )

    def _again(self, name: str) -> ClientEngine:
        """Restarts the replica's engine on its ranks, which may be busy."""
        if self._ranks.failure:
            raise self._ranks.failure
        (replica,) = [replica for replica in self._replicas if replica.name == name]
        self._note(f"rollout: {name} is restarted")
        places: list[Any] = [None] * self._plan.world_size
        for rank in replica.ranks:
            places[rank] = self._ask(rank, "place")

        def start(rank: int) -> dict[str, Any]:
            return self._ask(rank, "start", places, timeout=START_TIMEOUT + 60)

        with ThreadPoolExecutor(len(replica.hosts)) as pool:
            starts = {rank: pool.submit(start, rank) for rank in replica.hosts}
        return self._client(replica, {rank: start.result() for rank, start in starts.items()})

    def _client(self, replica: ReplicaRanks, facts: dict[int, dict[str, Any]]) -> ClientEngine:
        """facts: what each rank with a process of the engine returned from ``start``."""
        for of_rank in facts.values():
            for warning in of_rank["warnings"]:
                self._note(f"warning: {warning}")

        def stop() -> None:
            for rank, of_rank in facts.items():
                self._ask(rank, "stop", of_rank["number"])

        def ask(method: str, *args: Any, timeout: float | None = None) -> Any:
            return self._ask(replica.first, method, *args, timeout=timeout)

        pids = {rank: of_rank["pid"] for rank, of_rank in facts.items()}
        backend = self._current[replica.name] = RemoteBackend(replica, ask, facts[replica.first], pids, stop)
        return client_of(backend, self._plan, self._tokenizer, self._no_weights)

    def _ask(self, rank: int, method: str, *args: Any, timeout: float | None = None) -> Any:
        return self._ranks.ask(rank, HOST, method, *args, timeout=timeout)

    def fail(self, error: UserError) -> None:
        """The ranks have failed: fails every request to their engines."""
        for backend in list(self._current.values()):  # another thread may add one
            backend.fail(EngineDied("a rank of the run has failed"))

    def close(self) -> None:
        """Ends the engines on the ranks."""
        if self._ranks.alive:
            self._hosts.close()
