"""The WorkerGroup contract; each executor is a factory in GROUPS. And how a group of processes fails."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from doubler import Doubler

from verl.cluster.local import LocalWorkerGroup
from verl.cluster.ray.group import RayRanks
from verl.cluster.ray.placement import place, remove
from verl.cluster.ray.start import RaySettings, connected
from verl.errors import UserError

RANKS = 3


@pytest.fixture(scope="module")
def seats():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # where the ranks find their doubler
        with connected(RaySettings(None, {}, RANKS), print):
            seats = place(1, RANKS, "cpu", timeout=60)
            yield seats
            remove(seats)


@pytest.fixture
def start(seats, tmp_path):
    """Ranks with a doubler each, and the same patience as asked for."""
    started = []

    def start(**options) -> tuple[RayRanks, object]:
        ranks = RayRanks(seats, "cpu", **{"logs": tmp_path, "timeout": 60.0, **options})
        started.append(ranks)
        return ranks, ranks.make("doubler", "doubler:make")

    yield start
    for ranks in started:
        ranks.close()


@pytest.fixture(params=["local", "ray"])
def group(request):
    group = LocalWorkerGroup(Doubler()) if request.param == "local" else request.getfixturevalue("start")()[1]
    yield group
    group.close()


def test_a_worker_groups_contract(group):
    assert group.call("greet", "you", loud=True).result() == ["HELLO you"] * group.world_size

    table = pa.table({"x": [3, 1, 2, 7]})
    doubled = {"x": [3, 1, 2, 7], "doubled": [9, 3, 6, 21]}
    assert group.map("double", table, times=3).result().to_pydict() == doubled
    assert group.map("double", table.slice(1, 1), times=1).result().to_pydict() == {"x": [1], "doubled": [1]}
    shares = group.shares(table)
    assert len(shares) == group.world_size
    assert sorted(row for share in shares for row in share) == [0, 1, 2, 3]

    assert group.reduce("total", table).result() == {"total": 13.0}

    for _ in range(2):  # and the group goes on
        future = group.call("fail")
        with pytest.raises(UserError, match="from the worker"):
            future.result()
    with pytest.raises(OSError, match="No space left"):
        group.call("fill_the_disk").result()
    assert group.call("greet", "again").result()[0] == "hello again"


def test_each_rank_finds_its_rows_among_those_of_its_node(start):
    """As if the first two ranks had a node, and the third another."""
    ranks, group = start()
    ranks.seats = [replace(seat, node=seat.rank // 2) for seat in ranks.seats]
    for rows in range(6):
        table = pa.table({"x": pa.array(range(rows), pa.int64())})
        assert group.map("double", table).result()["doubled"].to_pylist() == [2 * x for x in range(rows)]
        assert group.reduce("total", table).result() == {"total": float(sum(range(rows)))}


def test_calls_that_are_given_together_come_in_one_order_to_all_ranks(start):
    _, group = start()
    futures = [group.reduce("total", pa.table({"x": [index]})) for index in range(20)]
    assert [future.result()["total"] for future in futures] == list(range(20))


@pytest.mark.parametrize(
    ("how", "timeout", "told"),
    [
        ("dies", 60.0, [r"rank 1 \(node .*pid \d+\) is gone while it was in 'alone'", "its last words"]),
        ("raises", 60.0, [r"rank 1 \(node .* failed in 'alone': RuntimeError: it went wrong", "raise RuntimeError"]),
        (
            "hangs",
            6.0,
            [r"did not finish 'alone' within trainer.worker_timeout=6 sec", "rank 1 is in 'alone'", "sleep"],
        ),
    ],
)
def test_a_rank_that_does_not_come_ends_the_run_with_one_message(start, monkeypatch, how, timeout, told):
    monkeypatch.setattr("verl.cluster.ray.group.GRACE", 2.0)
    heard: list[UserError] = []
    ranks, group = start(timeout=timeout, on_failure=heard.append)
    processes = [psutil.Process(pid) for pid in ranks.pids]
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        group.call("alone", 1, how).result()
    assert time.monotonic() - begun < timeout + 25
    message = str(caught.value)
    others = [] if how == "dies" else ["dist.barrier"]  # where they wait; one that dies, they may have noticed
    for part in [*told, *others]:
        assert re.search(part, message), message
    assert heard == [caught.value] == [ranks.failure]
    with pytest.raises(UserError) as again:  # at once, and the same
        group.call("greet", "you").result()
    assert again.value is caught.value
    ranks.close()
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert not alive


def test_a_rank_that_dies_while_nobody_waits_for_it_is_noticed(start):
    heard: list[UserError] = []
    ranks, _ = start(on_failure=heard.append)
    psutil.Process(ranks.pids[2]).kill()
    for _ in range(300):
        if heard:
            break
        time.sleep(0.1)
    assert "rank 2" in str(heard[0])
    with pytest.raises(UserError, match="rank 2"):
        ranks.ask(0, "doubler", "greet", "you")


def test_ranks_that_are_ended_after_an_error_of_the_driver_do_not_count_as_failed(start):
    ranks, group = start()
    busy = group.call("alone", 1, "hangs")
    begun = time.monotonic()
    ranks.end(ValueError, ValueError("the driver's own"), None)
    for late in (busy.result, group.call("greet", "you").result, lambda: ranks.ask(0, "doubler", "greet", "you")):
        with pytest.raises(UserError, match="ended"):
            late()
    assert ranks.failure is None
    assert time.monotonic() - begun < 15
    ranks.explain(ValueError, ValueError("the driver's own"), None)  # raises nothing of its own


def test_a_factory_that_fails_is_told_as_it_is(start):
    ranks, _ = start()
    with pytest.raises(UserError, match="failed in 'make other': AttributeError"):
        ranks.make("other", "doubler:nothing")
