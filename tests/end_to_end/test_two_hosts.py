"""The main job over two hosts, and what is told when one of them is lost."""

from __future__ import annotations

import time

import pytest
from helpers import arguments, command, wait_for_steps
from hosts import can_make_hosts, ray_on, two_hosts

pytestmark = pytest.mark.skipif(can_make_hosts() is not None, reason=str(can_make_hosts()))


@pytest.mark.parametrize("loss", ["killed", "cut off"])
def test_a_host_that_is_lost_ends_the_run_in_bounded_time_and_is_named(small, tmp_path, loss):
    keys = {
        "trainer__nnodes": 2,
        "trainer__device": "cpu",
        "trainer__total_training_steps": 10000,
        "trainer__worker_timeout": 30,
        "trainer__val_before_train": False,
    }
    with two_hosts("ipv4", tmp_path) as hosts, ray_on(hosts) as environment:
        log = tmp_path / "driver.log"
        run = hosts[0].start(command(arguments(small, tmp_path / "run", **keys)), log, environment)
        wait_for_steps(run, tmp_path / "run", 2, lambda: log.read_text()[-3000:])
        begun = time.monotonic()
        hosts[1].kill() if loss == "killed" else hosts[1].cut()
        assert run.wait(120) == 1, log.read_text()[-3000:]
        assert time.monotonic() - begun < 100
    told = log.read_text()
    assert "error: rank" in told
    assert "Traceback" not in told.split("error: rank")[1].split("Where they are")[0]
    if loss == "killed":
        assert "rank 1 (node node1, 10.94.16.5" in told
        assert "its node does not answer any more" in told or "is gone" in told
    else:
        assert "rank 1" in told
