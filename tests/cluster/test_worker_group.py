"""The WorkerGroup contract; each executor is a factory in GROUPS."""

import pyarrow as pa
import pytest

from verl.cluster.local import LocalWorkerGroup


class Doubler:
    def __init__(self):
        self.closed = False

    def greet(self, name, loud=False):
        return f"HELLO {name}" if loud else f"hello {name}"

    def double(self, rows, times=2):
        return rows.append_column("doubled", pa.array([times * x for x in rows["x"].to_pylist()]))

    def total(self, rows):
        return {"total": float(sum(rows["x"].to_pylist()))}

    def fail(self):
        raise RuntimeError("from the worker")

    def close(self):
        self.closed = True


GROUPS = {"local": lambda: LocalWorkerGroup(Doubler())}


@pytest.fixture(params=GROUPS)
def group(request):
    group = GROUPS[request.param]()
    yield group
    group.close()


def test_a_call_reaches_every_rank(group):
    assert group.call("greet", "you", loud=True).result() == ["HELLO you"] * group.world_size


def test_map_keeps_the_order_of_rows(group):
    table = pa.table({"x": [3, 1, 2]})
    assert group.map("double", table, times=3).result().to_pydict() == {"x": [3, 1, 2], "doubled": [9, 3, 6]}


def test_reduce_gives_one_set_of_metrics(group):
    assert group.reduce("total", pa.table({"x": [1, 2, 3]})).result() == {"total": 6.0}


def test_a_failure_is_raised_where_the_result_is_asked_for(group):
    future = group.call("fail")
    with pytest.raises(RuntimeError, match="from the worker"):
        future.result()
