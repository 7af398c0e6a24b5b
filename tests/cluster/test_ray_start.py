"""Ray, started or joined, and the seats of ranks on it; on this machine."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest
import ray
from helpers import ROOT
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from verl.cluster.ray import placement
from verl.cluster.ray.placement import ask_nodes, check_resources, place, remove
from verl.cluster.ray.start import RaySettings, connected
from verl.errors import UserError
from verl.machine import host_memory

# A driver: it is part of a cluster, as the settings say, while it runs the lines that it is given.
DRIVER = """
import json, os, ray, signal, sys, time
from verl.cluster.ray.start import RaySettings, connected
from verl.errors import UserError
handler = lambda *_: None
signal.signal(signal.SIGTERM, handler)
try:
    with connected(RaySettings(**json.loads(sys.argv[1])), print):
        print("in", ray.get_runtime_context().gcs_address, flush=True)
        exec(sys.argv[2])
except UserError as error:
    print("UserError:", error)
print("SIGTERM is ours:", signal.getsignal(signal.SIGTERM) is handler)
"""


@pytest.fixture(scope="module")
def notes():
    """What ``connected`` said, when it started a Ray with 4 CPU ranks and what it takes for 4 GPUs."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            patch.delenv(name)
        found: list[str] = []
        with connected(RaySettings(None, {"num_gpus": 4}, devices=4), found.append):
            yield found


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(placement, "SETTLING", 0.5)


def settings(**given) -> str:
    return json.dumps({"address": None, "init": {}, "devices": 1, **given})


def drive(settings: str, lines: str = "", **environment: str | None) -> str:
    """All that the driver printed."""
    chosen = {name: value for name, value in {**os.environ, **environment}.items() if value is not None}
    command = [sys.executable, "-c", DRIVER, settings, lines]
    done = subprocess.run(command, cwd=ROOT, env=chosen, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


# ---- what is started here


def test_a_machine_holds_as_many_cpu_ranks_as_are_asked_for_whatever_its_cores(notes):
    seats = place(1, 4, "cpu", timeout=30)
    assert [(seat.rank, seat.node, seat.local_rank, seat.bundle) for seat in seats] == [(i, 0, i, i) for i in range(4)]
    assert {seat.node_id for seat in seats} == {ray.get_runtime_context().get_node_id()}
    remove(seats)
    assert notes == [notes[0]]
    assert "(4 CPUs, 4 GPUs)" in notes[0]


def test_every_rank_is_given_a_gpu_of_its_own(notes):
    seats = place(1, 4, "cuda", timeout=30)

    @ray.remote(num_cpus=1, num_gpus=1)
    def gpu() -> str:
        return os.environ["CUDA_VISIBLE_DEVICES"]

    strategies = [PlacementGroupSchedulingStrategy(seat.group, seat.bundle) for seat in seats]
    given = ray.get([gpu.options(scheduling_strategy=strategy).remote() for strategy in strategies])
    assert sorted(given) == ["0", "1", "2", "3"]
    remove(seats)


@pytest.mark.parametrize(
    ("nnodes", "devices", "device", "says"),
    [
        (2, 1, "cpu", "1 CPU rank on each of 2 machines, but the Ray cluster has 1 node"),
        (1, 5, "cpu", "5 CPU ranks on one machine, but no node has them"),
        (1, 5, "cuda", "5 GPUs on one machine, but no node has them"),
    ],
)
def test_what_the_cluster_does_not_have_is_refused_with_a_table_of_what_it_has(
    notes, impatient, nnodes, devices, device, says
):
    with pytest.raises(UserError, match=says) as refusal:
        check_resources(nnodes, devices, device)
    line = next(line for line in str(refusal.value).splitlines() if "127.0.0.1" in line)
    assert line.split()[-2:] == ["4/4", "4/4"]


def test_devices_that_others_hold_are_refused_as_such_and_free_again_afterwards(notes, impatient):
    seats = place(1, 3, "cuda", timeout=30)
    for ask in (lambda: check_resources(1, 2, "cuda"), lambda: place(1, 2, "cuda", timeout=0.5)):
        with pytest.raises(UserError, match="others hold some of them") as refusal:
            ask()
        assert "1/4" in str(refusal.value)
    remove(seats)
    check_resources(1, 4, "cuda")


def test_ray_listens_on_the_loopback_only(notes):
    tree = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip
        for process in tree
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 3  # this process, Ray's control store, its node manager
    addresses = [ipaddress.ip_address(ip) for ip in listening]
    assert all((getattr(address, "ipv4_mapped", None) or address).is_loopback for address in addresses), listening


def test_ray_asks_for_a_token_that_only_this_user_can_read(notes):
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert ray._private.worker._global_node.get_session_dir_path().startswith(str(token.parent))


# ---- what is joined


def test_a_running_cluster_is_joined_and_left_running(notes):
    here = ray.get_runtime_context().gcs_address
    found = drive(settings(address=here, init={"num_cpus": 3, "namespace": "x"}), "print(ray.cluster_resources())")
    assert f"Joined the Ray cluster at {here}" in found
    assert "ray_kwargs.ray_init.num_cpus has no effect" in found
    assert "'GPU': 4.0" in found
    assert "SIGTERM is ours: True" in found
    assert ray.cluster_resources()["CPU"] == 4


@pytest.mark.parametrize(
    "environment",
    [
        {"RAY_AUTH_TOKEN": "0" * 64},
        {"RAY_AUTH_TOKEN_PATH": "/no/such/file"},
        {"RAY_AUTH_MODE": None, "RAY_AUTH_TOKEN_PATH": None},
    ],
    ids=["another", "lost", "none"],
)
def test_a_wrong_token_is_refused_with_what_has_to_be_the_same(notes, tmp_path, environment):
    here = ray.get_runtime_context().gcs_address
    found = drive(settings(address=here), HOME=str(tmp_path), **environment)
    assert "refused this command's token: RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH" in found
    assert "~/.ray/auth_token" in found


def test_another_version_of_ray_is_refused_with_both(notes):
    here = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-c", f"import ray\nray.__version__ = '2.0.0'\n{DRIVER}", settings(address=here), ""]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert "has another version" in found
    assert f"Ray: {ray.__version__}" in found
    assert "Ray: 2.0.0" in found


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("127.0.0.1:1", "no Ray cluster answers at 127.0.0.1:1"),
        ("no.such.host:6379", "no Ray cluster answers at no.such.host:6379"),
        ("10.94.16.4", "not host:port"),
        ("ray://10.94.16.4:10001", "Ray Client"),
        ("fd94:16::4:6379", r"needs brackets, such as \[fd94:16::4\]:6379"),
        ("fd94:16::4", r"needs brackets, such as \[fd94:16::4\]:6379"),
        ("[fd94:16::4]", "not host:port"),
    ],
)
def test_an_address_that_leads_nowhere_is_refused_with_what_it_should_be(monkeypatch, address, says):
    monkeypatch.setattr("verl.cluster.ray.start.REACH_TIMEOUT", 0.3)
    with pytest.raises(UserError, match=says), connected(RaySettings(address, {}, 1), print):
        pass


# ---- what is left


@pytest.fixture
def temporary():
    """A folder for temporary files, with a path short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="v", dir="/tmp") as folder:
        yield Path(folder)


def test_a_node_is_asked_once_for_all_of_its_ranks(notes):
    seats = place(1, 3, "cuda", timeout=30)
    try:
        ((seat, memory),) = ask_nodes(seats, host_memory, timeout=60)
        assert seat.rank == 0
        assert 0 < memory.available < memory.total <= psutil.virtual_memory().total
        with pytest.raises(UserError, match=r"(?s)^no process .*ZeroDivisionError"):
            ask_nodes(seats, lambda: 1 / 0, timeout=60)
    finally:
        remove(seats)


def processes_with(text: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if text in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


@pytest.mark.parametrize("lines", ["", "raise UserError('the run failed')"], ids=["well", "badly"])
def test_nothing_is_left_of_a_ray_that_was_started_here(temporary, lines):
    home = temporary / "home"
    home.mkdir()
    found = drive(settings(), lines, HOME=str(home), TMPDIR=str(temporary), RAY_AUTH_MODE=None, RAY_ADDRESS=None)
    assert "in 127.0.0.1:" in found
    assert "SIGTERM is ours: True" in found
    assert ("UserError: the run failed" in found) == bool(lines)
    assert list(home.rglob("*")) == []  # no ~/.ray/auth_token, which would change what `ray start --head` does
    assert list(temporary.iterdir()) == [home]
    assert processes_with(str(temporary)) == []


def test_no_process_is_left_when_the_driver_is_killed(temporary):
    """And where a `ray start` that is gone left its address, Ray is started, and this is said."""
    (temporary / "ray").mkdir()
    (temporary / "ray" / "ray_current_cluster").write_text("127.0.0.1:1")
    given = settings(init={"_temp_dir": str(temporary / "ray")})
    environment = {**os.environ, "HOME": str(temporary), "TMPDIR": str(temporary)}
    command = [sys.executable, "-c", DRIVER, given, "time.sleep(600)"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        try:
            assert "left the address 127.0.0.1:1" in driver.stdout.readline()
            while not driver.stdout.readline().startswith("in "):
                assert driver.poll() is None
            assert len(processes_with(str(temporary))) > 2
        finally:
            driver.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 60
    while (left := processes_with(str(temporary))) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == []


def test_an_argument_that_ray_does_not_know_is_a_user_error(temporary):
    found = drive(settings(init={"num_cpu": 3}), TMPDIR=str(temporary), RAY_ADDRESS=None)
    assert "UserError: Ray could not be started here with ray_kwargs.ray_init={'num_cpu': 3}" in found
