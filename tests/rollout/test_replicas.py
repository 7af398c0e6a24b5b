"""Rollout replicas on the ranks of a job. The ranks are threads here, and what goes to them and back is pickled, as it
is for ranks that are processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_backend import EOS, FakeBackend, response
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from verl.errors import UserError, portable
from verl.rollout.client.backend import Backend, EngineDied, GenerateRequest, TokenChunk
from verl.rollout.client.engine import ClientEngine
from verl.rollout.contract.base import Capabilities, Request, Result, SamplingParams
from verl.rollout.embedded.engine import HFEngine
from verl.rollout.embedded.sampling import row_keys
from verl.rollout.replicas import remote
from verl.rollout.replicas.embedded import EmbeddedBackend, seed_from
from verl.rollout.replicas.host import EngineHost, Place, Reports
from verl.rollout.replicas.layout import ReplicaRanks, replicas_of
from verl.rollout.replicas.remote import RemoteBackend
from verl.rollout.replicas.weights import WeightsOnRanks
from verl.rollout.router.concurrent import deal
from verl.rollout.router.router import Replica, Router
from verl.rollout.weights.checksums import Piece, piece_of
from verl.rollout.weights.receiver import NamedTensors, serve_session
from verl.rollout.weights.sender import Session, WeightSender

pytestmark = pytest.mark.timeout(120)  # of a deadlock

PATIENCE = 5.0  # seconds that a rank waits for the others
NOBODY = 1 << 30  # no process has this number


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited 20 s"
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    until(lambda: set(threading.enumerate()) <= before)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch) -> None:
    monkeypatch.setattr(remote, "REPORT_WAIT", 0.5)


# --- a job -----------------------------------------------------------------------------------------------------------


class Actor:
    """Its weights, a tensor whenever all ranks have come for it. passes: over all of them."""

    def __init__(self, ranks: int):
        self.tensors = {name: torch.randn(8, size) for name, size in (("a", 1), ("b", 2), ("c", 3), ("d", 40))}
        self.passes = 0
        self.on_device: set[int] = set()  # ranks
        self._all = threading.Barrier(ranks, timeout=PATIENCE)

    def stream(self, rank: int) -> Iterator[tuple[str, torch.Tensor]]:
        self.passes += rank == 0
        for name, tensor in self.tensors.items():
            assert rank in self.on_device
            self._all.wait()
            yield name, tensor.clone()

    @contextmanager
    def loaded(self, rank: int) -> Iterator[None]:
        self.on_device.add(rank)
        yield
        self.on_device.remove(rank)


class Worker:
    """A tensor-parallel rank of an engine: its rows of every tensor. dies_at, refuses: the tensor at which it does."""

    def __init__(self, rank: int, of: int):
        self.rank, self.of = rank, of
        self.rows: dict[str, torch.Tensor] = {}
        self.updates = 0
        self.dies_at = self.refuses = ""
        self.takes = 0.0  # seconds, at the end

    def begin(self) -> None:
        self.updates += 1

    def load(self, tensors: NamedTensors) -> None:
        for name, tensor in tensors:
            if name == self.dies_at:
                raise SystemExit
            if name == self.refuses:
                raise ValueError(f"{name} has no place here")
            self.rows[name] = tensor.chunk(self.of)[self.rank].clone()

    def finish(self) -> None:
        time.sleep(self.takes)

    def pieces(self) -> list[Piece]:
        return [
            piece_of(name, rows, (len(rows) * self.of, *rows.shape[1:]), start=self.rank * len(rows))
            for name, rows in self.rows.items()
        ]


class Engine(FakeBackend):
    """With a worker for each of these places, which gets its weights from the sender there."""

    end_tokens = frozenset({EOS})

    def __init__(self, places: Sequence[Place], sender: WeightSender):
        super().__init__()
        self.workers = [Worker(rank, len(places)) for rank in range(len(places))]
        self.process = SimpleNamespace(pid=os.getpid())
        self._places, self._sender = places, sender

    def listen(self, listener: Reports) -> None:
        super().listen(listener)
        self.go()

    def _step(self) -> None:
        if self.under_way:
            super()._step()

    def die_of(self, *orders: str) -> None:
        self.fails |= dict.fromkeys(orders, EngineDied("the fake engine was killed"))

    def update_weights(self, stream, version: int) -> None:
        with self._session("update_weights") as session:
            session.load(stream)
        self.update_seconds = session.seconds

    def pieces(self) -> list[list[Piece]]:
        with self._session("checksums") as session:
            return session.pieces()

    @contextmanager
    def _session(self, order: str) -> Iterator[Session]:
        self._note(order)
        self._check_idle()
        pool = ThreadPoolExecutor(len(self.workers))
        for place, worker in zip(self._places, self.workers, strict=True):
            key = bytes.fromhex(place.sender.key)
            pool.submit(serve_session, place.sender.address, key, worker.rank, worker)
        pool.shutdown(wait=False)  # who is refused leaves before the others do
        with self._sender.session(lambda: True) as session:
            yield session


class Job:
    """Its ranks' hosts, and its driver's router. engines: of each rank that holds them, one for each start.

    gone: ranks that do not answer. calls: that all ranks were given.
    """

    def __init__(self, world_size: int, tensor_parallel: int = 1, per_node: int = 0, restarts: int = 0):
        self.replicas = replicas_of(world_size, per_node or world_size, tensor_parallel)
        self.actor = Actor(world_size)
        self.engines: dict[int, list[Engine]] = {rank: [] for replica in self.replicas for rank in replica.hosts}
        self.gone: set[int] = set()
        self.calls: list[tuple] = []
        self.notes: list[str] = []
        self._threads = ThreadPoolExecutor(world_size, thread_name_prefix="rank")
        self.hosts = [self._host(rank) for rank in range(world_size)]
        self.weights = WeightsOnRanks(self, self.replicas)
        places = self.call("place").result()
        facts = self.call("start", places).result()
        self.router = Router(
            [Replica(replica.name, self.client(replica, facts)) for replica in self.replicas],
            revive=self._again,
            revivals=restarts,
            save=lambda stream, version: stream,
            note=self.notes.append,
        )
        self.members = self.router.members

    def _host(self, rank: int) -> EngineHost:
        (replica,) = [replica for replica in self.replicas if rank in replica.ranks]
        sender = WeightSender(receivers=1, device=torch.device("cpu"), dtype=None, bucket_bytes=256)
        place = Place(sender.endpoint, None, f"127.0.0.1:{rank}")

        def start(places: Sequence[Place]) -> Backend:
            engine = Engine(places, sender)
            self.engines[rank].append(engine)
            return engine

        return EngineHost(
            rank,
            replica,
            lambda: place,
            start,
            sender=sender,
            weights=lambda: self.actor.stream(rank),
            loaded=lambda: self.actor.loaded(rank),
        )

    def call(self, method: str, *args: Any) -> Future[list[Any]]:
        """Of all hosts, at once."""
        self.calls.append((method, *args))
        calls = [self._threads.submit(self.ask, rank, method, *args) for rank in range(len(self.hosts))]
        return SimpleNamespace(result=lambda: [call.result() for call in calls])

    def ask(self, rank: int, method: str, *args: Any, timeout: float | None = None) -> Any:
        """Of one host."""
        if rank in self.gone:
            raise UserError(f"rank {rank} is gone")
        try:
            return as_sent(getattr(self.hosts[rank], method)(*as_sent(args)))
        except Exception as error:
            raise as_sent(portable(error)) from error

    def client(self, replica: ReplicaRanks, facts: Sequence[dict[str, Any]]) -> ClientEngine:
        """facts: by rank, of its start."""
        numbers = {rank: facts[rank]["number"] for rank in replica.hosts}
        backend = RemoteBackend(
            replica,
            lambda method, *args, timeout=None: self.ask(replica.first, method, *args, timeout=timeout),
            facts[replica.first],
            {rank: facts[rank]["pid"] for rank in replica.hosts},
            lambda: [self.ask(rank, "stop", number) for rank, number in numbers.items()],
        )
        return ClientEngine(
            backend, eos_token_ids=[EOS], max_model_len=400, vocab_size=100, no_weights="it has not been given any"
        )

    def _again(self, name: str) -> ClientEngine:
        (replica,) = [replica for replica in self.replicas if replica.name == name]
        places = [self.ask(rank, "place") if rank in replica.ranks else None for rank in range(len(self.hosts))]
        facts = [self.ask(rank, "start", places) if rank in replica.hosts else {} for rank in range(len(self.hosts))]
        return self.client(replica, facts)

    def engine(self, replica: int) -> Engine:
        return self.engines[self.replicas[replica].first][-1]

    def update(self, version: int) -> None:
        asyncio.run(self.router.update_weights(self.weights, version))

    def check(self) -> list[str]:
        return asyncio.run(self.router.check_weights(self.weights))

    def generate(self, count: int) -> list[Result]:
        return asyncio.run(self.router.generate([one(str(index), 3 + index) for index in range(count)]))

    def kill(self, replica: int, *orders: str) -> None:
        """Its engine, which is found out by one of these orders; by default by any."""
        self.engine(replica).die_of(*(orders or ("generate", "drop_cache", "update_weights", "checksums", "health")))
        pids = self.members[replica].engine.backend.pids
        pids |= dict.fromkeys(pids, NOBODY)

    @property
    def states(self) -> list[str]:
        return [member.state for member in self.members]

    @property
    def versions(self) -> list[int]:
        return [member.engine.version for member in self.members]

    def holds(self, replica: int) -> bool:
        """Whether the rows of its engine's workers are the actor's tensors."""
        workers = self.engine(replica).workers
        return all(
            torch.equal(torch.cat([worker.rows[name] for worker in workers]), tensor)
            for name, tensor in self.actor.tensors.items()
        )

    def close(self) -> None:
        asyncio.run(self.router.close())
        for host in self.hosts:
            host.close()
        self._threads.shutdown()


def as_sent(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def one(id: str = "one", prompt: int = 3, **sampling) -> Request:
    """With a prompt of this many tokens."""
    return Request(id, [5] * prompt, SamplingParams(**{"max_new_tokens": 12, **sampling}))


def request(id: str, prompt: int = 3, tokens: int = 12) -> GenerateRequest:
    return GenerateRequest(id, [5] * prompt, tokens, SamplingParams(max_new_tokens=tokens), frozenset({EOS}), False)


@pytest.fixture
def start() -> Iterator[Callable[..., Job]]:
    with contextlib.ExitStack() as stack:

        def start(*args: int, **options: int) -> Job:
            job = Job(*args, **options)
            stack.callback(job.close)
            return job

        yield start


# --- layout ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "per_node", "tensor_parallel", "ranks", "hosts", "host_of", "names"),
    [
        (4, 4, 2, [[0, 1], [2, 3]], [[0], [2]], [0, 0, 2, 2], ["replica 0 (ranks 0 to 1)", "replica 1 (ranks 2 to 3)"]),
        (4, 2, 4, [[0, 1, 2, 3]], [[0, 2]], [0, 0, 2, 2], ["replica 0 (ranks 0 to 3)"]),
        (8, 4, 8, [list(range(8))], [[0, 4]], [0] * 4 + [4] * 4, ["replica 0 (ranks 0 to 7)"]),
        (8, 4, 4, [[0, 1, 2, 3], [4, 5, 6, 7]], [[0], [4]], [0] * 4 + [4] * 4, None),
        (2, 2, 1, [[0], [1]], [[0], [1]], [0, 1], ["replica 0 (rank 0)", "replica 1 (rank 1)"]),
    ],
)
def test_each_replica_has_consecutive_ranks_and_a_process_on_each_of_their_nodes(
    world_size, per_node, tensor_parallel, ranks, hosts, host_of, names
):
    replicas = replicas_of(world_size, per_node, tensor_parallel)
    assert [list(replica.ranks) for replica in replicas] == ranks
    assert [replica.hosts for replica in replicas] == hosts
    assert [replica.host_of(rank) for replica in replicas for rank in replica.ranks] == host_of
    assert [replica.first for replica in replicas] == [of_replica[0] for of_replica in ranks]
    assert [replica.index for replica in replicas] == list(range(len(ranks)))
    assert names is None or [replica.name for replica in replicas] == names


def test_only_ranks_that_are_to_hold_a_process_start_one(start):
    job = start(8, 4, per_node=2)
    assert {rank: len(engines) for rank, engines in job.engines.items()} == {0: 1, 2: 1, 4: 1, 6: 1}
    assert [host.start([]) for host in job.hosts[1::2]] == [None] * 4


# --- one pass over the weights for all -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "per_node"), [(3, 1, 3), (4, 2, 4), (4, 2, 2), (4, 4, 2), (1, 1, 1)]
)
def test_an_update_is_one_pass_over_the_weights_for_all_replicas(start, world_size, tensor_parallel, per_node):
    job = start(world_size, tensor_parallel, per_node)
    job.update(version=3)
    assert job.actor.passes == 1
    assert job.versions == [3] * len(job.replicas)
    assert all(job.holds(replica.index) for replica in job.replicas)
    assert job.check() == []
    assert job.actor.passes == 2
    assert not job.actor.on_device
    assert [result.response_ids for result in job.generate(8)] == [response(3 + index, 12) for index in range(8)]


# Of replica 1's engine.
ENDS: dict[str, Callable[[Job], None]] = {
    "before the update": lambda job: job.kill(1),
    "as the update begins": lambda job: job.kill(1, "update_weights"),
    "at the first tensor": lambda job: setattr(job.engine(1).workers[0], "dies_at", "a"),
    "in the middle": lambda job: setattr(job.engine(1).workers[0], "dies_at", "c"),
    "in its last worker": lambda job: setattr(job.engine(1).workers[-1], "dies_at", "c"),
}


@pytest.mark.parametrize("tensor_parallel", [1, 2])
@pytest.mark.parametrize("end", ENDS)
def test_a_replica_that_dies_of_an_update_is_taken_out_and_the_others_are_updated(start, end, tensor_parallel):
    job = start(3 * tensor_parallel, tensor_parallel)
    job.update(version=1)
    job.actor.tensors = {name: tensor + 1 for name, tensor in job.actor.tensors.items()}
    ENDS[end](job)
    job.update(version=2)
    assert job.states == ["used", "dead", "used"]
    assert (job.versions, job.actor.passes) == ([2, 1, 2], 2)
    assert job.holds(0)
    assert job.holds(2)
    assert f"{job.replicas[1].name} is taken out" in job.notes[0]
    job.update(version=3)
    assert (job.versions, job.actor.passes) == ([3, 1, 3], 3)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_what_one_replica_refuses_is_told_as_it_is_and_the_others_are_updated(start, tensor_parallel):
    job = start(3 * tensor_parallel, tensor_parallel)
    for worker in job.engine(1).workers:
        worker.refuses = "c"
    with pytest.raises(UserError, match="rank 0 of the engine: c has no place here") as caught:
        job.update(version=1)
    assert not isinstance(caught.value, EngineDied)
    assert job.actor.passes == 1
    assert job.states == ["used"] * 3
    assert job.versions == [1, 0, 1]
    assert job.holds(0)
    assert job.holds(2)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_where_one_replica_dies_and_another_refuses_both_are_told(start, tensor_parallel):
    job = start(2 * tensor_parallel, tensor_parallel)
    job.kill(0, "update_weights")
    for worker in job.engine(1).workers:
        worker.refuses = "c"
    with pytest.raises(UserError, match="c has no place here"):
        job.update(version=1)
    assert job.states == ["dead", "used"]


def test_an_update_tells_what_its_slowest_rank_spent_its_time_on(start):
    job = start(4, 2)
    job.engine(0).workers[1].takes = 0.5  # its sender is that of rank 1, and not of the engine's first rank
    job.update(1)
    slow, quick = (member.engine.update_seconds for member in job.members)
    assert set(slow) == set(quick) == {"arrive", "open", "gather", "wait", "close", "model"}
    assert quick["wait"] < slow["wait"]
    assert slow["wait"] >= 0.5
    assert job.router.update_seconds == slow


@pytest.mark.parametrize("error", [EngineDied("killed"), UserError("it has no cache to drop")])
def test_a_replica_whose_client_fails_before_it_asks_for_weights_holds_nobody_up(start, error):
    job = start(3)
    job.engine(2).fails["drop_cache"] = error
    if isinstance(error, EngineDied):
        job.update(version=1)
    else:
        with pytest.raises(UserError, match="no cache to drop"):
            job.update(version=1)
    assert job.actor.passes == 1
    assert job.versions == [1, 1, 0]
    assert job.states[2] == ("dead" if isinstance(error, EngineDied) else "used")
    assert job.engine(2).workers[0].updates == 0


def test_an_update_for_which_no_replica_asks_makes_no_pass(start):
    job = start(2)
    for replica in range(2):
        job.engine(replica).fails["drop_cache"] = UserError("it has no cache to drop")
    with pytest.raises(UserError, match="no cache to drop"):
        job.update(version=1)
    assert job.actor.passes == 0


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_replica_that_is_back_gets_the_weights_alone(start, tensor_parallel):
    job = start(3 * tensor_parallel, tensor_parallel, restarts=1)
    job.update(version=4)
    job.kill(1)
    assert [result.response_ids for result in job.generate(12)] == [response(3 + index, 12) for index in range(12)]
    until(lambda: job.states == ["used"] * 3)
    assert len(job.engines[job.replicas[1].first]) == 2
    sent = [(version, sorted(pids)) for method, version, pids in job.calls[2:]]
    assert sent == [(4, [0, 1, 2]), (4, [1])]
    assert job.actor.passes == 2
    assert job.versions == [4] * 3
    assert job.holds(1)
    updates = [[worker.updates for worker in job.engine(replica).workers] for replica in range(3)]
    assert updates == [[1] * tensor_parallel] * 3
    assert job.check() == []
    job.update(version=5)
    assert job.versions == [5] * 3


def test_the_weights_are_not_read_on_the_driver(start):
    with pytest.raises(TypeError, match="not through the driver"):
        list(start(1).weights)


# --- what differs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_tensors_that_differ_are_named_with_their_replica(start, tensor_parallel):
    job = start(3 * tensor_parallel, tensor_parallel)
    job.update(version=1)
    job.engine(0).workers[0].rows["b"][1, 1] += 1
    job.engine(2).workers[-1].rows["a"][0, 0] += 1
    del job.engine(2).workers[0].rows["d"]
    found = job.check()
    says = [(0, "b differs (checksum "), (2, "a differs (checksum "), (2, "d is ")]
    assert len(found) == len(says)
    for line, (replica, said) in zip(found, says, strict=True):
        assert line.startswith(f"{job.replicas[replica].name}: {said}")
    assert job.actor.passes == 2


def test_a_replica_that_is_not_asked_is_not_compared(start):
    job = start(3)
    job.update(version=1)
    for replica in range(3):
        job.engine(replica).workers[0].rows["b"] += 1
    pids = {replica: job.members[replica].engine.backend.pids for replica in (0, 2)}
    found = job.weights.check(pids)
    assert {replica: [line.split()[0] for line in lines] for replica, lines in found.items()} == {0: ["b"], 2: ["b"]}
    assert ["checksums" in job.engine(replica).log for replica in range(3)] == [True, False, True]
    job.kill(1)
    assert [line.partition(":")[0] for line in job.check()] == [job.replicas[replica].name for replica in (0, 2)]
    assert job.states == ["used", "dead", "used"]


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_replica_that_dies_while_it_is_compared_is_taken_out(start, tensor_parallel):
    job = start(2 * tensor_parallel, tensor_parallel)
    job.update(version=1)
    job.kill(0)
    begun = time.monotonic()
    assert job.check() == []
    assert time.monotonic() - begun < 20
    assert job.states == ["dead", "used"]


# --- the end of patience ---------------------------------------------------------------------------------------------


class Failing:
    """Ranks that answer with this, or in whose answering the driver is interrupted."""

    def __init__(self, error: BaseException):
        self.error = error

    def call(self, method: str, *args: Any) -> Any:
        raise self.error


def deal_from(error: BaseException, before: Callable[[int], object] = lambda replica: None) -> list[Any]:
    """What each of two replicas was told of its update. before: called in a replica's thread before it asks."""
    told: list[Any] = []

    async def update(replica: int, stream: Any) -> None:
        before(replica)
        try:
            told.append(stream.update({replica: {replica: 1}}, 1)[replica])
        except Exception as error:
            told.append(error)

    try:
        deal(WeightsOnRanks(Failing(error), replicas_of(2, 2, 1)), [0, 1], update)
    except KeyboardInterrupt as interrupt:
        told.append(interrupt)
    return told


def test_what_the_ranks_fail_with_every_replica_is_told():
    error = UserError("rank 1 is gone")
    assert deal_from(error) == [error, error]


@pytest.mark.parametrize("when", ["while a replica has yet to ask", "while the ranks send"])
def test_an_interrupt_leaves_no_replica_waiting_and_none_believing_that_it_was_updated(when):
    def before(replica: int) -> None:
        if replica == 1 and when == "while a replica has yet to ask":
            time.sleep(0.3)  # until the driver waits for it
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.2)

    one, other, interrupt = deal_from(KeyboardInterrupt(), before)
    assert isinstance(one, RuntimeError)
    assert isinstance(other, RuntimeError)
    assert isinstance(interrupt, KeyboardInterrupt)


# --- the host --------------------------------------------------------------------------------------------------------


def test_an_old_client_that_leaves_does_not_stop_a_newer_engine(start):
    job = start(2, restarts=1)
    job.update(version=1)
    first = job.members[1].engine
    job.kill(1)
    asyncio.run(job.router.health())
    until(lambda: job.states == ["used"] * 2)
    old, new = job.engines[1]
    first.backend.close()
    assert (old.closed, new.closed) == (True, False)
    assert old.log.count("close") == 1
    assert len(job.generate(4)) == 4


def test_orders_of_an_old_client_do_not_reach_a_newer_engine(start):
    """They may be on their way for as long as a restart takes."""
    job = start(1)
    job.update(version=1)
    held, go_on, heard = threading.Event(), threading.Event(), []
    current = job.members[0].engine

    def slow(method: str, *args: Any, timeout: float | None = None) -> Any:
        held.set()
        go_on.wait()
        return job.ask(0, method, *args, timeout=timeout)

    old = RemoteBackend(job.replicas[0], slow, current.backend.facts, current.backend.pids, lambda: None)
    old.listen(SimpleNamespace(generated=heard.extend, failed=heard.append, died=lambda error: None))
    held.wait()
    asyncio.run(current.close())
    new = job.client(job.replicas[0], [job.ask(0, "start", [job.ask(0, "place")])])
    asyncio.run(new.update_weights(job.weights, version=2))
    old.abort([f"{index:016x}" for index in range(2)])  # the names of the new one's draws, too

    async def run() -> list[Result]:
        streamed = {"max_new_tokens": 300, "ignore_eos": True, "stop_token_ids": (9,)}
        call = asyncio.create_task(new.generate([one("a", **streamed), one("b", **streamed)]))
        while len(job.engine(0).under_way) < 2:
            await asyncio.sleep(0.001)
        go_on.set()
        return await asyncio.wait_for(call, 20)

    assert [result.response_ids for result in asyncio.run(run())] == [response(3, 300)] * 2
    assert heard == []
    old.close()
    asyncio.run(new.close())


def test_an_engine_is_started_in_a_thread_that_stays():
    """The system ends a process with the thread that started it."""
    threads: list[threading.Thread] = []

    def start(places: Sequence[Place]) -> Backend:
        threads.append(threading.current_thread())
        return FakeBackend()

    place = Place(None, None, "127.0.0.1:1")
    host = EngineHost(0, ReplicaRanks(0, 0, 1, 1), lambda: place, start)
    for _ in range(2):
        caller = threading.Thread(target=host.start, args=([place],))
        caller.start()
        caller.join()
    assert threads[0] is threads[1]
    assert threads[0].is_alive()
    host.close()


def test_a_start_that_fails_leaves_no_engine_and_the_next_may_work():
    engines = [FakeBackend(), UserError("no room"), FakeBackend()]

    def start(places: Sequence[Place]) -> Backend:
        engine = engines.pop(0)
        if isinstance(engine, Exception):
            raise engine
        return engine

    place = Place(None, None, "127.0.0.1:1")
    host = EngineHost(0, ReplicaRanks(0, 0, 1, 1), lambda: place, start)
    first = engines[0]
    assert host.start([place])["number"] == 1
    with pytest.raises(UserError, match="no room"):
        host.start([place])
    assert first.closed
    with pytest.raises(EngineDied, match="this engine is gone"):
        host.order(1, "health")
    number = host.start([place])["number"]
    assert number != 1
    host.order(number, "health")
    host.close()


# --- reports ---------------------------------------------------------------------------------------------------------


class Listener:
    """Writes down what it is told, and by whom."""

    def __init__(self) -> None:
        self.heard: list[tuple] = []

    def received(self, reports: Sequence[TokenChunk]) -> None:
        self.heard += [("received", report.id) for report in reports]

    def failed(self, request_id: str, error: Exception) -> None:
        self.heard.append(("failed", request_id, error))

    def died(self, error: EngineDied) -> None:
        self.heard.append(("died", error))


def test_reports_are_kept_in_order_until_they_are_asked_for():
    reports = Reports()
    generated = [TokenChunk(str(index), [index], [-1.0], None) for index in range(3)]
    reports.received(generated[:2])
    reports.failed("x", UserError("no room"))
    reports.received(generated[2:])
    first, failed, last = reports.take(0)
    assert (first, last) == (("received", generated[:2]), ("received", generated[2:]))
    assert failed[:2] == ("failed", "x")
    assert reports.take(0) == []


def test_a_question_for_reports_is_answered_as_soon_as_there_is_one():
    reports = Reports()
    timer = threading.Timer(0.1, reports.failed, ["x", UserError("no room")])
    timer.start()
    begun = time.monotonic()
    assert len(reports.take(60)) == 1
    assert time.monotonic() - begun < 20
    timer.join()


class Ask:
    """A rank that answers questions for reports with what it is told to, and keeps the orders it is given.

    gate: orders wait while it is closed.
    """

    def __init__(self) -> None:
        self.reports, self.orders, self.waiting = Reports(), [], 0
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.given = threading.Event()

    def __call__(self, method: str, *args: Any, timeout: float | None = None) -> Any:
        if method == "reports":
            assert timeout is not None
            assert timeout > args[-1]
            self.waiting += 1
            heard = self.reports.take(args[-1])
            self.waiting -= 1
        else:
            self.given.set()
            self.gate.wait()
            heard = self.orders.append((method, *args[1:]))
        if self.error:
            raise self.error
        return heard

    def stop(self) -> None:
        self.gate.set()
        self.reports.end()
        if self.error:
            raise self.error


def build(ask: Ask, end_tokens: Sequence[int] = (EOS,), holds_weights: bool = True) -> RemoteBackend:
    capabilities = Capabilities(own_process=True, holds_weights=holds_weights)
    facts = {"number": 1, "capabilities": capabilities, "keeps_weights": False, "end_tokens": list(end_tokens)}
    return RemoteBackend(ReplicaRanks(0, 0, 1, 1), ask, facts, {0: 1}, ask.stop)


@pytest.fixture
def ask() -> Ask:
    return Ask()


@pytest.fixture
def backend(ask) -> Iterator[RemoteBackend]:
    backend = build(ask)
    yield backend
    backend.close()


def test_a_listener_is_told_all_reports_in_order_and_nothing_after_a_death(ask, backend):
    listener = Listener()
    ask.reports.received([TokenChunk("a", [1], [-1.0], None), TokenChunk("b", [1], [-1.0], "stop")])
    ask.reports.failed("c", UserError("no room"))
    ask.reports.received([TokenChunk("d", [1], [-1.0], None)])
    ask.reports.died(EngineDied("killed"))
    ask.reports.received([TokenChunk("e", [1], [-1.0], None)])
    backend.listen(listener)
    until(lambda: len(listener.heard) == 5)
    ask.reports.received([TokenChunk("f", [1], [-1.0], None)])
    backend.fail(UserError("the rank is gone, too"))
    time.sleep(0.05)
    *told, (_, death) = listener.heard
    assert [each[:2] for each in told] == [("received", "a"), ("received", "b"), ("failed", "c"), ("received", "d")]
    assert isinstance(death, EngineDied)
    assert str(death) == "killed"


def test_nothing_is_told_after_the_driver_itself_found_the_engine_gone(ask, backend):
    listener = Listener()
    backend.listen(listener)
    until(lambda: ask.waiting == 1)
    backend.fail(UserError("the rank is gone"))
    ask.reports.received([TokenChunk("late", [1], [-1.0], None)])
    until(lambda: not ask.waiting)
    time.sleep(0.05)
    assert [kind for kind, _ in listener.heard] == ["died"]


class Unsendable(Exception):  # noqa: N818
    def __init__(self, one: int, other: int):
        super().__init__(f"{one} and {other}")


def test_an_error_of_a_generate_comes_to_the_driver_whatever_it_is():
    reports = Reports()
    reports.failed("a", UserError("no room"))
    reports.failed("b", Unsendable(1, 2))
    (_, _, first), (_, _, second) = as_sent(reports.take(0))
    assert isinstance(first, UserError)
    assert str(second) == "Unsendable: 1 and 2"


# --- orders ----------------------------------------------------------------------------------------------------------


def test_generates_and_aborts_that_come_together_go_together_and_in_order(ask, backend):
    backend.listen(Listener())
    ask.gate.clear()
    backend.generate([request("first")])
    ask.given.wait()  # it is on its way
    for order in ([request("a")], [request("b"), request("c")], ["a"], ["first", "b"], [request("d")], ["d"], []):
        (backend.generate if order and isinstance(order[0], GenerateRequest) else backend.abort)(order)
    ask.gate.set()
    until(lambda: len(ask.orders) == 2)
    assert ask.orders == [
        ("generate_and_abort", [[request("first")]]),
        (
            "generate_and_abort",
            [[request("a"), request("b"), request("c")], ["a", "first", "b"], [request("d")], ["d"]],
        ),
    ]


def test_an_engine_ends_responses_at_its_own_end_tokens_and_an_embedded_one_at_any(ask):
    stops = [frozenset(), frozenset({EOS, 7}), frozenset({7})]
    assert [build(ask).stops_at(each) for each in stops] == [True, True, False]
    assert [build(ask, end_tokens=()).stops_at(each) for each in stops] == [True, True, True]


def test_an_engine_without_weights_of_its_own_asks_for_none_and_differs_in_none(ask):
    engine = client_of(build(ask, holds_weights=False))
    asyncio.run(engine.update_weights((), version=5))
    assert asyncio.run(engine.check_weights(())) == []
    assert engine.version == 5
    assert [order[1] for order in ask.orders if order[0] == "order"] == ["drop_cache"]
    asyncio.run(engine.close())


def client_of(backend: RemoteBackend) -> ClientEngine:
    return ClientEngine(backend, eos_token_ids=[EOS], max_model_len=400, vocab_size=100)


@pytest.mark.parametrize("how", ["an order fails", "a question fails", "the driver is told"])
def test_the_end_of_the_rank_is_that_of_its_engine_and_of_all_its_requests(ask, backend, how):
    engine = client_of(backend)

    async def run() -> None:
        if how == "an order fails":
            ask.error = UserError("rank 0 is gone")
        calls = [asyncio.create_task(engine.generate([one(str(index))])) for index in range(3)]
        while how != "an order fails" and not ask.orders:
            await asyncio.sleep(0.01)
        if how == "a question fails":
            ask.error = UserError("rank 0 is gone")
        if how == "the driver is told":
            await asyncio.to_thread(backend.fail, UserError("rank 0 is gone"))
        for call in calls:
            with pytest.raises(EngineDied, match="rank 0 is gone"):
                await asyncio.wait_for(call, 10)
        with pytest.raises(EngineDied, match="rank 0 is gone"):
            await engine.generate([one()])

    asyncio.run(run())


def test_an_order_that_is_not_answered_in_time_is_the_end_of_the_engine(ask, backend):
    engine = client_of(backend)
    ask.error = TimeoutError()
    with pytest.raises(EngineDied, match=r"replica 0 \(rank 0\) did not answer 'health' within"):
        backend.health()
    with pytest.raises(EngineDied):
        asyncio.run(engine.health())


def test_a_rank_that_ended_before_anybody_listened_is_told_to_who_does(ask, backend):
    ask.error = UserError("rank 0 is gone")
    backend.fail(ask.error)
    listener = Listener()
    backend.listen(listener)
    until(lambda: bool(listener.heard))
    assert [kind for kind, _ in listener.heard] == ["died"]


@pytest.mark.parametrize("gone", [False, True])
def test_a_closed_backend_leaves_no_thread_and_no_question_behind(ask, monkeypatch, gone):
    monkeypatch.setattr(remote, "REPORT_WAIT", 60.0)
    backend = build(ask)
    backend.listen(Listener())
    until(lambda: ask.waiting == 1)
    ask.gate.clear()
    backend.generate([request("first")])
    ask.given.wait()
    backend.abort(["first"])
    if gone:
        ask.error = UserError("rank 0 is gone")
    backend.close()
    if gone:  # nobody waits for what it is still asked
        until(lambda: not any(thread.is_alive() for thread in backend._threads))
    assert not any(thread.is_alive() for thread in backend._threads)


def test_a_closed_router_has_no_question_under_way_at_a_rank(monkeypatch, start):
    """The end of the ranks would be taken for a failure of theirs."""
    monkeypatch.setattr(remote, "REPORT_WAIT", 60.0)
    job = start(2)
    job.update(version=1)
    questions = [thread for member in job.members for thread in member.engine.backend._threads]
    assert all(thread.is_alive() for thread in questions)
    begun = time.monotonic()
    asyncio.run(job.router.close())
    assert not any(thread.is_alive() for thread in questions)
    assert time.monotonic() - begun < 5


def test_a_rank_that_is_gone_does_not_keep_the_router_from_closing(start):
    job = start(2)
    job.update(version=1)
    job.gone.add(1)
    job.members[1].engine.backend.fail(UserError("rank 1 is gone"))
    asyncio.run(job.router.health())
    assert job.states == ["used", "dead"]
    asyncio.run(job.router.close())
    until(lambda: not any(thread.is_alive() for member in job.members for thread in member.engine.backend._threads))
    job.gone.clear()


# --- the embedded engine of a rank -----------------------------------------------------------------------------------


def tiny_model() -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(
            vocab_size=100,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=256,
            initializer_range=0.2,
        )
        return Qwen2ForCausalLM(config).eval()


class Gathered(HFEngine):
    """Keeps count of how often the module was made whole, and shared out again."""

    gathered = shared_out = 0

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        self.gathered += 1
        with super().whole_weights():
            yield
        self.shared_out += 1


class Embedded:
    """threads: that ran the module. steps: forwards of it."""

    def __init__(self) -> None:
        self.threads: set[int] = set()
        self.steps = 0
        model = tiny_model()
        model.register_forward_pre_hook(self._count)
        self.engine = Gathered(model, eos_token_ids=[EOS], max_model_len=220, max_num_seqs=4)
        self.backend = EmbeddedBackend(self.engine)
        self.reports = Reports()
        self.backend.listen(self.reports)
        self.error: Exception | None = None
        self.closed = False

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self.backend.close()

    def _count(self, module: torch.nn.Module, args: tuple) -> None:
        self.threads.add(threading.get_ident())
        self.steps += 1
        if self.error:
            raise self.error

    def heard(self, count: int) -> list[tuple]:
        """So many reports."""
        found: list[tuple] = []
        while len(found) < count:
            told = self.reports.take(20)
            assert told, "waited 20 s"
            found += told
        return found

    def received(self, *requests: GenerateRequest) -> dict[str, TokenChunk]:
        self.backend.generate(requests)
        return {report.id: report for kind, reports in self.heard(len(requests)) for report in reports}

    def aborted(self, request: GenerateRequest) -> TokenChunk:
        """What there is of it after some steps."""
        begun = self.steps
        self.backend.generate([request])
        until(lambda: self.steps >= begun + 6)
        self.backend.abort([request.id])
        ((_, (report,)),) = self.heard(1)
        return report


@pytest.fixture
def embedded() -> Iterator[Embedded]:
    embedded = Embedded()
    yield embedded
    embedded.close()


def long(id: str, prompt: list[int], generated: Sequence[int] = (), **sampling) -> GenerateRequest:
    """Or the rest of it."""
    settings = SamplingParams(**{"max_new_tokens": 150, "seed": 2**64 - 3, **sampling})
    stop_ids = frozenset(settings.stop_token_ids) | (frozenset() if settings.ignore_eos else {EOS})
    return GenerateRequest(
        id, [*prompt, *generated], settings.max_new_tokens - len(generated), settings, stop_ids, False
    )


def itself(requests: list[Request]) -> list[Result]:
    engine = HFEngine(tiny_model(), eos_token_ids=[EOS], max_model_len=220, max_num_seqs=4)
    return asyncio.run(engine.generate(requests))


def test_an_embedded_engine_generates_the_same_tokens_for_a_driver_as_in_its_own_process(embedded):
    asked = [
        Request(str(index), [5 + index] * 4, SamplingParams(max_new_tokens=40, seed=index, ignore_eos=index % 2 == 0))
        for index in range(8)
    ]
    reports = embedded.received(
        *[
            GenerateRequest(
                request.id,
                list(request.prompt_ids),
                40,
                request.sampling,
                frozenset() if request.sampling.ignore_eos else frozenset({EOS}),
                False,
            )
            for request in asked
        ]
    )
    for result in itself(asked):
        found = reports[result.id]
        assert (found.ids, found.finish) == (result.response_ids, result.finish_reason)
        assert found.log_probs == pytest.approx(result.log_probs, abs=1e-5)
    assert len(embedded.threads) == 1
    assert threading.get_ident() not in embedded.threads


def test_a_aborted_generate_gives_what_it_has_and_leaves_the_others(embedded):
    prompt = [7, 8, 9]
    ((whole,),) = [itself([Request("x", prompt, SamplingParams(150, ignore_eos=True, seed=2**64 - 3))])]
    begun = embedded.steps
    embedded.backend.generate([long("long", prompt, ignore_eos=True), long("other", [5, 6], ignore_eos=True)])
    until(lambda: embedded.steps >= begun + 6)
    embedded.backend.abort(["long", "nobody"])
    first, last = (report for _, reports in embedded.heard(2) for report in reports)
    assert (first.id, first.finish, last.id, last.finish) == ("long", "abort", "other", "length")
    assert 0 < len(first.ids) == len(first.log_probs) < 150
    assert first.ids == whole.response_ids[: len(first.ids)]
    assert len(last.ids) == 150


@pytest.mark.parametrize("pauses", [1, 3])
def test_the_rest_of_a_response_is_what_it_would_have_been_without_a_pause(embedded, pauses):
    prompt, sampling = [7, 8, 9], {"ignore_eos": True, "temperature": 1.3}
    (whole,) = itself([Request("x", prompt, SamplingParams(150, seed=2**64 - 3, **sampling))])
    ids: list[int] = []
    for pause in range(pauses):
        ids += embedded.aborted(long(f"part {pause}", prompt, ids, **sampling)).ids
    rest = embedded.received(long("rest", prompt, ids, **sampling))["rest"]
    assert 6 * pauses <= len(ids) < 150
    assert ids + rest.ids == whole.response_ids


@given(st.integers(-(2**63), 2**64), st.integers(0, 2**20), st.integers(0, 2**20))
def test_the_noise_of_a_response_goes_on_where_a_pause_was(seed, generated, further):
    rest = np.array([seed_from(seed, generated) % 2**64, seed % 2**64], np.uint64)
    after, through = row_keys(rest, np.array([further, generated + further]))
    assert after.tolist() == through.tolist()


def test_tokens_from_before_a_pause_count_as_new_tokens_of_the_least_that_there_must_be(embedded):
    prompt, sampling = [7, 8, 9], {"stop_token_ids": tuple(range(90)), "min_new_tokens": 60}
    (whole,) = itself([Request("x", prompt, SamplingParams(150, seed=2**64 - 3, **sampling))])
    assert 60 < len(whole.response_ids) < 80
    ids = embedded.aborted(long("part", prompt, **sampling)).ids
    rest = embedded.received(long("rest", prompt, ids, **sampling))["rest"]
    assert 6 <= len(ids) < 60
    assert ids + rest.ids == whole.response_ids
    assert rest.finish == "stop"
    late = whole.response_ids[:-1]  # the least is there already
    rest = embedded.received(long("late", prompt, late, **sampling))["late"]
    assert late + rest.ids == whole.response_ids


def test_an_engine_that_is_awake_or_asleep_is_so_once(embedded):
    engine, backend = embedded.engine, embedded.backend
    for _ in range(2):
        backend.sleep(["weights"])
    assert (engine.gathered, engine.shared_out) == (0, 0)
    for cycle in range(1, 3):
        for _ in range(2):
            backend.wake(["weights"])
        assert (engine.gathered, engine.shared_out) == (cycle, cycle - 1)
        assert len(embedded.received(long(str(cycle), [5], max_new_tokens=3))) == 1
        for _ in range(2):
            backend.sleep(["weights"])
        assert (engine.gathered, engine.shared_out) == (cycle, cycle)


def test_a_generate_that_fails_is_reported_and_the_next_may_work(embedded):
    embedded.error = UserError("the model's logits are not finite numbers")
    embedded.backend.generate([long("one", [5]), long("other", [6])])
    failed = embedded.heard(2)
    assert {(kind, id, str(error)) for kind, id, error in failed} == {
        ("failed", id, "the model's logits are not finite numbers") for id in ("one", "other")
    }
    embedded.error = None
    assert len(embedded.received(long("next", [5], max_new_tokens=3))["next"].ids) <= 3


def test_a_closed_embedded_engine_has_reported_what_it_had_and_gives_the_module_back(embedded):
    embedded.backend.wake(["weights"])
    embedded.backend.generate([long("long", [7, 8, 9], ignore_eos=True)])
    until(lambda: embedded.steps >= 6)
    embedded.close()
    ((_, (report,)),) = embedded.reports.take(0)
    assert (report.id, report.finish) == ("long", "abort")
    assert 0 < len(report.ids) < 150
    assert (embedded.engine.gathered, embedded.engine.shared_out) == (1, 1)
    assert not embedded.backend._thread.is_alive()
