"""What the ranks of a job on several nodes hold, and how the driver starts it: without Ray, GPUs or SGLang."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from verl.config.loading.load import load
from verl.config.sections.models import Config
from verl.data.ragged import Ragged
from verl.data.schema import with_columns
from verl.errors import UserError
from verl.memory.gpu_balance import DISABLE, GPUReading
from verl.plan import RunPlan, engine_of, plan_run
from verl.rollout.client.backend import EngineDied, GenerateRequest
from verl.rollout.contract.base import Capabilities, Request, SamplingParams
from verl.rollout.embedded.engine import HFEngine
from verl.rollout.engines.sglang.arguments import environment_of
from verl.rollout.processes.adapter import Adapter
from verl.rollout.replicas.host import EngineHost, Outcome
from verl.rollout.replicas.layout import replicas_of
from verl.trainer.ppo import ranks
from verl.trainer.ppo.metrics import StageCost, sequence_lengths
from verl.trainer.ppo.ranks import HOST, WORKER, make_host, token_shares
from verl.trainer.ppo.replicas import Replicas
from verl.trainer.ppo.runtime import Runtime
from verl.trainer.ppo.stages import Stages
from verl.trainer.ppo.step_log import StepLog
from verl.trainer.ppo.updates import Updates

pytestmark = pytest.mark.timeout(120)  # of a deadlock

NUMBERS = ["0", "1", "2", "3"]
IN_ANY_ORDER = ["2", "0", "3", "1"]  # as Ray may give them to its ranks
UUIDS = [f"GPU-{letter * 8}-0000-0000-0000-000000000000" for letter in "7c1e"]


def planned(model: Path, device: str = "cuda", **keys: object) -> tuple[Config, RunPlan]:
    """Of 8 ranks on 2 nodes, unless told otherwise."""
    chosen = {
        "actor_rollout_ref.model.path": model,
        "actor_rollout_ref.rollout.name": "sglang",
        "data.train_batch_size": 8,
        "data.max_prompt_length": 8,
        "data.max_response_length": 12,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 4,
        "trainer.nnodes": 2,
        "trainer.n_gpus_per_node": 4,
        **{name.replace("__", "."): value for name, value in keys.items()},
    }
    loaded = load([f"{name}={value}" for name, value in chosen.items()])
    assert loaded.config is not None, loaded.problems
    return loaded.config, plan_run(loaded.config, device=device, train_rows=24)


class Started:
    """Stands for ``SubprocessBackend``: keeps what it was started with."""

    capabilities, keeps_weights, end_tokens = Capabilities(own_process=True), False, frozenset({1})
    all_of: list[Started]

    def __init__(self, adapter: Adapter, settings: Any, **options: Any):
        self.settings = settings
        self.log, self.environment, self.part = options["log"], options["environment"], options["part"]
        self.sender, self.senders = options["sender"], options["senders"]
        self.process = SimpleNamespace(pid=os.getpid())
        self.generated: list[GenerateRequest] = []
        self.closed = False
        self.all_of.append(self)

    def describe(self) -> str:
        return "a stand-in for SGLang"

    def listen(self, listener: Any) -> None:
        self.listener = listener

    def generate(self, requests: Sequence[GenerateRequest]) -> None:
        self.generated += requests

    def update_weights(self, stream: Any, version: int) -> None:
        self.update_seconds: dict[str, float] = {}

    def drop_cache(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def started(monkeypatch) -> list[Started]:
    """All that were, in order."""
    Started.all_of = []
    monkeypatch.setattr(ranks, "SubprocessBackend", Started)
    monkeypatch.setattr(ranks, "read_gpus", lambda indices, chosen: [])
    ports = itertools.count(20000)  # real ones may come twice
    monkeypatch.setattr(ranks, "free_port", lambda address: next(ports))
    return Started.all_of


class Ranks:
    """Stands for ``RayRanks``: the ranks are threads. asked: the calls of single ranks."""

    failure: UserError | None = None

    def __init__(
        self, plan: RunPlan, gpus: Sequence[str | None], addresses: Sequence[str] = ("127.0.0.1", "127.0.0.1")
    ):
        per_node = plan.devices_per_node
        self.heres = [
            SimpleNamespace(rank=rank, address=addresses[rank // per_node], gpu=gpus[rank % per_node], objects={})
            for rank in range(plan.world_size)
        ]
        self.asked: list[tuple[int, str]] = []
        self.hosts_closed = False
        self._threads = ThreadPoolExecutor(plan.world_size)

    def make(self, name: str, factory: str, *args: Any) -> Any:
        assert factory == "verl.trainer.ppo.ranks:make_host"
        for here in self.heres:
            here.objects[name] = make_host(here, *args)
        return SimpleNamespace(call=self.call, call_within=self.call_within, close=self.close)

    @property
    def alive(self) -> bool:
        return self.failure is None

    @property
    def hosts(self) -> list[EngineHost]:
        return [here.objects[HOST] for here in self.heres]

    def call(self, method: str, *args: Any) -> Any:
        calls = [self._threads.submit(getattr(host, method), *args) for host in self.hosts]
        return SimpleNamespace(result=lambda: [call.result() for call in calls])

    def call_within(self, timeout: float, method: str, *args: Any) -> Any:
        return self.call(method, *args)

    def ask(self, rank: int, name: str, method: str, *args: Any, timeout: float | None = None) -> Any:
        if self.failure:
            raise self.failure
        self.asked.append((rank, method))
        return getattr(self.heres[rank].objects[name], method)(*args)

    def close(self) -> None:
        if not self.hosts_closed:
            self.hosts_closed = True
            for host in self.hosts:
                host.close()
            self._threads.shutdown()


@pytest.fixture
def made(small, started, tmp_path) -> Iterator[Callable[..., Ranks]]:
    """Ranks that have their hosts. They are closed at the end."""
    with ExitStack() as stack:

        def made(gpus: Sequence[str | None], **keys: object) -> Ranks:
            config, plan = planned(small / "model", **keys)
            found = Ranks(plan, gpus)
            found.make(HOST, "verl.trainer.ppo.ranks:make_host", engine_of(config, plan), tmp_path)
            stack.callback(found.close)
            return found

        yield made


# --- the processes of a replica --------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [NUMBERS, IN_ANY_ORDER, UUIDS], ids=["numbers", "in any order", "UUIDs"])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_each_process_is_given_the_gpus_and_the_senders_of_its_node(made, started, tensor_parallel, gpus):
    job = made(gpus, actor_rollout_ref__rollout__tensor_model_parallel_size=tensor_parallel)
    places = job.call("place").result()
    assert len({place.sender.address for place in places}) == len({place.rendezvous for place in places}) == 8
    facts = [host.start(places) for host in job.hosts]
    replicas = replicas_of(8, 4, tensor_parallel)
    holders = [(replica, node, rank) for replica in replicas for node, rank in enumerate(replica.hosts)]
    assert [rank for rank, of_rank in enumerate(facts) if of_rank is not None] == [rank for _, _, rank in holders]
    for process, (replica, node, rank) in zip(started, holders, strict=True):
        on_node = [other for other in replica.ranks if other // 4 == rank // 4]
        names = [gpus[other % 4] for other in on_node]
        part = process.part
        assert part.gpus == tuple(names)
        assert environment_of(process.settings, {}, part)["CUDA_VISIBLE_DEVICES"] == ",".join(names)
        assert (part.node_rank, part.nnodes) == (node, len(replica.hosts))
        assert part.rendezvous == places[replica.first].rendezvous
        assert (part.address, part.interface) == ("127.0.0.1", "lo")
        assert process.sender.endpoint == places[rank].sender
        senders = {replica.ranks.index(other): places[other].sender for other in on_node}
        assert process.senders == senders
        assert process.settings.tensor_parallel == tensor_parallel
        assert (facts[rank]["describe"] == "a stand-in for SGLang") == (rank == replica.first)
    assert len({process.log for process in started}) == len(holders)


def test_a_process_that_is_started_again_writes_to_a_log_of_its_own_and_meets_elsewhere(made, started):
    job = made(NUMBERS, actor_rollout_ref__rollout__tensor_model_parallel_size=8)
    for _ in range(3):
        places = job.call("place").result()
        for host in job.hosts:
            host.start(places)
    assert len({process.log for process in started}) == 6
    assert len({process.part.rendezvous for process in started}) == 3
    assert [process.closed for process in started] == [True] * 4 + [False] * 2
    assert len({process.sender.endpoint.address for process in started}) == 2  # of the ranks, whatever starts


def test_ranks_on_cpus_name_no_gpus(made, started):
    job = made([None] * 4, device="cpu", actor_rollout_ref__rollout__tensor_model_parallel_size=2)
    places = job.call("place").result()
    for host in job.hosts:
        host.start(places)
    assert [process.part.gpus for process in started] == [None] * 4
    assert "CUDA_VISIBLE_DEVICES" not in environment_of(started[0].settings, {}, started[0].part)


@pytest.mark.parametrize("disabled", [False, True])
def test_gpus_of_a_replica_whose_free_memory_differs_are_told_before_it_starts(made, started, monkeypatch, disabled):
    looked_at: list[str] = []

    def read(indices: Sequence[int], chosen: str) -> list[GPUReading]:
        looked_at.append(chosen)
        return [GPUReading(name, 80000 if index else 10000, 80000) for index, name in enumerate(chosen.split(","))]

    monkeypatch.setattr(ranks, "read_gpus", read)
    monkeypatch.delenv(DISABLE, raising=False)
    if disabled:
        monkeypatch.setenv(DISABLE, "True")
    job = made(IN_ANY_ORDER, actor_rollout_ref__rollout__tensor_model_parallel_size=2)
    places = job.call("place").result()
    with nullcontext() if disabled else pytest.raises(UserError, match="GPU 3: 10,000"):
        (warning,) = job.hosts[2].start(places)["warnings"]
        assert "GPU 3: 10,000" in warning
    assert looked_at == ["3,1"]
    assert len(started) == disabled


# --- the worker of the same rank -------------------------------------------------------------------------------------


class Worker:
    """Stands for ``PPOWorker``."""

    def __init__(self, model: torch.nn.Module):
        self.engines = {"actor": SimpleNamespace(module=model, root=model)}
        self.borrowed_now: list[str] = []
        self.sent = 0

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in self.engines["actor"].module.named_parameters():
            assert self.borrowed_now == ["actor"]
            self.sent += 1
            yield name, tensor

    @contextmanager
    def borrowed(self, role: str) -> Iterator[None]:
        self.borrowed_now.append(role)
        yield
        self.borrowed_now.remove(role)


def test_a_host_that_was_made_before_its_worker_sends_that_ones_weights(made):
    job = made(NUMBERS)
    model = torch.nn.Linear(3, 4)
    for here in job.heres:
        here.objects[WORKER] = Worker(model)
    assert job.call("send_weights", 1, {}).result() == [Outcome()] * 8
    assert [here.objects[WORKER].sent for here in job.heres] == [2] * 8  # all take part, for whoever needs them


def test_an_embedded_engine_generates_with_the_actor_of_its_rank(small, made):
    job = made(
        [None], device="cpu", trainer__nnodes=1, trainer__n_gpus_per_node=1, actor_rollout_ref__rollout__name="hf"
    )
    model = AutoModelForCausalLM.from_pretrained(small / "model").eval()
    (here,) = job.heres
    here.objects[WORKER] = Worker(model)
    (host,) = job.hosts
    place = host.place()
    assert (place.sender, place.gpu) == (None, None)
    facts = host.start([place])
    assert not facts["capabilities"].holds_weights
    sampling = SamplingParams(max_new_tokens=9, seed=5)
    host.generate_and_abort(facts["number"], [[GenerateRequest("a", [5, 6], 9, sampling, frozenset({1}), False)]])
    ((_, (generated,)),) = host.reports(facts["number"], 20)
    itself = HFEngine(model, eos_token_ids=[1], max_model_len=20)
    (expected,) = asyncio.run(itself.generate([Request("a", [5, 6], sampling)]))
    assert generated.ids == expected.response_ids


# --- the driver's side -----------------------------------------------------------------------------------------------


Driven = tuple[Ranks, Replicas, list[str]]


@pytest.fixture
def driven(small, started, tmp_path) -> Iterator[Callable[[int], Driven]]:
    """8 ranks, their replicas of so many ranks each, and what the user was told."""
    with ExitStack() as stack:

        def driven(tensor_parallel: int) -> Driven:
            keys = {"actor_rollout_ref__rollout__tensor_model_parallel_size": tensor_parallel}
            config, plan = planned(small / "model", **keys)
            job, notes = Ranks(plan, NUMBERS), []
            tokenizer = AutoTokenizer.from_pretrained(small / "model")
            replicas = Replicas(job, engine_of(config, plan), tokenizer, tmp_path, notes.append)
            stack.callback(job.close)
            for here in job.heres:
                here.objects[WORKER] = Worker(torch.nn.Linear(3, 4))
            return job, replicas, notes

        yield driven


def test_a_driver_starts_all_replicas_and_one_again_on_its_own_ranks(driven, started):
    job, replicas, notes = driven(2)
    router = replicas.start()
    assert notes == ["a stand-in for SGLang, 4 replicas of it"]
    assert [member.name for member in router.members] == [replica.name for replica in replicas_of(8, 4, 2)]
    assert len(started) == 4
    member = router.members[2]
    asyncio.run(member.engine.close())
    (stopped,) = [process for process in started if process.closed]
    assert stopped.sender.endpoint == job.hosts[4].place().sender
    job.asked.clear()
    engine = replicas._again(member.name)
    asked = [each for each in job.asked if each[1] != "reports"]
    assert asked == [(4, "place"), (5, "place"), (4, "start")]
    assert started[4].part.gpus == stopped.part.gpus == ("0", "1")
    assert started[4].part.rendezvous != stopped.part.rendezvous
    assert engine.backend.facts["number"] == 2
    asyncio.run(engine.close())
    assert started[4].closed
    asyncio.run(router.close())
    replicas.close()
    assert all(process.closed for process in started)
    assert job.hosts_closed


def test_when_the_ranks_are_gone_nobody_waits_for_their_engines_and_nothing_is_asked_of_them(driven, started):
    job, replicas, _ = driven(1)
    router = replicas.start()
    asyncio.run(router.update_weights(replicas.weights, version=0))

    async def run() -> None:
        call = asyncio.create_task(
            router.generate([Request(str(i), [5, 6], SamplingParams(max_new_tokens=4)) for i in range(8)])
        )
        while sum(len(process.generated) for process in started) < 8:
            await asyncio.sleep(0.01)
        job.failure = UserError("rank 3 is gone")
        await asyncio.to_thread(replicas.fail, job.failure)
        with pytest.raises(EngineDied, match="no rollout engine is left"):
            await asyncio.wait_for(call, 20)

    asyncio.run(run())
    asked = len(job.asked)
    asyncio.run(router.close())
    replicas.close()
    assert len(job.asked) == asked
    assert not job.hosts_closed


# --- how rows are shared over the ranks ------------------------------------------------------------------------------


def table_of(prompts: Sequence[int], responses: Sequence[int]) -> pa.Table:
    """Of rows with so many tokens."""
    count = len(prompts)
    columns = {
        "prompt_ids": Ragged.from_rows([[5] * length for length in prompts], np.int32),
        "response_ids": Ragged.from_rows([[6] * length for length in responses], np.int32),
        "response_mask": Ragged.from_rows([[1] * length for length in responses], np.int8),
        "group": np.arange(count) // 2,
    }
    return with_columns(pa.table({"uid": [str(row) for row in range(count)]}), **columns)


lengths = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 900)), min_size=1, max_size=40)


@given(lengths, st.integers(1, 8))
def test_balanced_ranks_get_each_row_once_and_tokens_that_differ_by_at_most_the_longest_row(rows, count):
    table = table_of(*zip(*rows, strict=True))
    shares = token_shares(balance=True)(table, count)
    assert len(shares) == count
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(rows)))
    tokens = [sum(sum(rows[row]) for row in share) for share in shares]
    assert max(tokens) - min(tokens) <= max(map(sum, rows))
    assert sum(tokens) == sequence_lengths(table).sum()


@given(lengths, st.integers(1, 8))
def test_without_balancing_ranks_get_rows_in_their_order(rows, count):
    shares = token_shares(balance=False)(table_of(*zip(*rows, strict=True)), count)
    assert np.concatenate(shares).tolist() == list(range(len(rows)))
    sizes = [len(share) for share in shares]
    assert len(shares) == count
    assert max(sizes) - min(sizes) <= 1


class Progress:
    """Of nobody's interest."""

    def stage(self, name: str, total: int | None) -> Any:
        return nullcontext(SimpleNamespace(advance=lambda: None))


class Recording:
    """A worker group whose ranks write down the rows they are given for each optimizer step."""

    def __init__(self, world_size: int, balance: bool):
        self.world_size, self._shares = world_size, token_shares(balance)
        self.steps: list[list[list[str]]] = []
        self.unloaded: list[tuple[Any, ...]] = []

    def call(self, method: str, *args: Any) -> Any:
        if method == "unload":
            self.unloaded.append(args)
        return SimpleNamespace(result=lambda: [StageCost(0.0, 0.0, 0)] if method == "unload" else None)

    def reduce(self, method: str, table: pa.Table, **kwargs: Any) -> Any:
        self.steps.append([table.take(pa.array(share))["uid"].to_pylist() for share in self._shares(table, 4)])
        return SimpleNamespace(result=lambda: {"actor/skipped_steps": 0.0})


def test_the_rows_of_an_optimizer_step_do_not_depend_on_how_ranks_share_them(small):
    config, plan = planned(
        small / "model",
        device="cpu",
        trainer__nnodes=1,
        data__train_batch_size=16,
        actor_rollout_ref__actor__ppo_epochs=2,
        actor_rollout_ref__actor__shuffle=True,
    )
    generated = np.random.default_rng(0).integers(1, 13, (2, 32))
    table = table_of(*generated.tolist())
    table = with_columns(table, advantages=Ragged.from_rows([[0.0] * length for length in generated[1]], np.float32))
    taken = {}
    for balance in (False, True):
        workers = Recording(plan.world_size, balance)
        rollout = SimpleNamespace(capabilities=Capabilities())
        runtime = Runtime(None, workers, rollout, lambda: (), SimpleNamespace(stage=Progress().stage))  # type: ignore[arg-type]
        Updates(config, plan, Stages(runtime)).actor(table, 1, StepLog())
        taken[balance] = workers.steps
        assert workers.unloaded == [("actor", True)]  # but for its parameters, which go to the rollout engine next
    assert len(taken[False]) == len(taken[True]) == 8

    def rows(step: list[list[str]]) -> list[str]:
        return sorted(row for share in step for row in share)

    assert [rows(step) for step in taken[False]] == [rows(step) for step in taken[True]]
    assert taken[False] != taken[True]
