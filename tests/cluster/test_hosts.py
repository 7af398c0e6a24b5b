"""Two hosts: that they are what a test takes them for, and Ray, its seats and addresses on both."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from hosts import ADDRESSES, RAY, can_make_hosts, ray_on, two_hosts

pytestmark = pytest.mark.skipif(can_make_hosts() is not None, reason=str(can_make_hosts()))

FAMILIES = ["ipv4", "ipv6"]

# A driver that asks for a rank on each of two nodes and prints where they are, and what they find there.
DRIVER = """
import json, os, sys, ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from verl.cluster.network import free_port, interface_of
from verl.cluster.ray import placement, start
from verl.cluster.ray.placement import check_resources, place, remove
from verl.cluster.ray.start import RaySettings, connected
from verl.errors import UserError

start.NODE_TIMEOUT = 0.5

@ray.remote(num_cpus=1)
def look():
    address = ray.util.get_node_ip_address()
    return address, os.uname().nodename, interface_of(address), free_port(address) > 1023

try:
    with connected(RaySettings(os.environ.get("RAY_ADDRESS"), {}, 1), print):
        check_resources(2, 1, "cpu")
        seats = place(2, 1, "cpu", timeout=30)
        strategies = [PlacementGroupSchedulingStrategy(seat.group, seat.bundle) for seat in seats]
        seen = ray.get([look.options(scheduling_strategy=strategy).remote() for strategy in strategies])
        remove(seats)
        print(json.dumps([[seat.rank, seat.node, seat.local_rank, seat.address, seat.hostname] for seat in seats]))
        print(json.dumps(seen))
        placement.SETTLING = 0.2
        check_resources(2, 2, "cpu")
except UserError as error:
    print("UserError:", error)
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def hosts(family, tmp_path_factory):
    with two_hosts(family, tmp_path_factory.mktemp("hosts")) as hosts:
        yield hosts


@pytest.fixture(scope="module")
def environment(hosts):
    with ray_on(hosts) as environment:
        yield environment


def connects(hosts, timeout: float = 2) -> bool:
    """Whether the second host reaches the first."""
    serve = (
        f"import socket; s = socket.create_server(('{hosts[0].address}', 5000), family={_family(hosts)}); s.accept()"
    )
    server = hosts[0].start([sys.executable, "-c", serve], hosts[0].folder / "server.log")
    call = f"import socket; socket.create_connection(('{hosts[0].address}', 5000), {timeout})"
    try:
        deadline = time.monotonic() + 3 * timeout
        while time.monotonic() < deadline:
            if hosts[1].run([sys.executable, "-c", call]).returncode == 0:
                return True
        return False
    finally:
        server.kill()
        server.wait()


def _family(hosts) -> int:
    return 10 if ":" in hosts[0].address else 2


def test_a_host_has_its_own_name_processes_files_and_network(hosts, family):
    names = [host.run(["uname", "-n"]).stdout.strip() for host in hosts]
    assert names == ["node0", "node1"]
    hosts[0].run(["touch", "/dev/shm/mine", "/tmp/ray/mine"])
    assert hosts[1].run(["ls", "/dev/shm", "/tmp/ray"]).stdout.split() == ["/dev/shm:", "/tmp/ray:"]
    listing = "import psutil; print([a.address for n, e in psutil.net_if_addrs().items() for a in e if n == 'eth0'])"
    assert f"'{ADDRESSES[family][1]}'" in hosts[1].run([sys.executable, "-c", listing]).stdout
    assert int(hosts[1].run(["sh", "-c", "echo $$"]).stdout) < 1000


def test_killing_a_host_ends_all_that_runs_on_it_and_on_no_other(hosts, tmp_path):
    running = [host.start(["sh", "-c", "sleep 600 & sleep 600"], tmp_path / "log") for host in hosts for _ in range(2)]
    deadline = time.monotonic() + 20
    while any(host.run(["pgrep", "-c", "sleep"]).stdout.strip() != "4" for host in hosts):
        assert time.monotonic() < deadline
    hosts[1].kill()
    assert [process.wait(10) for process in running[2:]] == [-9, -9]
    assert hosts[1].run(["pgrep", "sleep"]).stdout == ""
    assert [process.poll() for process in running[:2]] == [None, None]
    running[0].terminate()
    assert running[0].wait(10) == -15
    hosts[0].kill()


def test_a_command_that_takes_too_long_is_ended(hosts):
    with pytest.raises(subprocess.TimeoutExpired):
        hosts[0].run(["sleep", "600"], timeout=0.5)
    assert hosts[0].run(["pgrep", "sleep"]).stdout == ""


def test_ray_is_on_both_hosts_as_the_guide_says(hosts, environment):
    status = hosts[1].run([RAY, "status"], environment=environment).stdout
    assert status.count(" node_") == 2
    assert "/2.0 CPU" in status


@pytest.mark.parametrize("driver", [0, 1])
def test_ranks_are_seated_by_node_the_drivers_first_and_find_their_interface_there(hosts, environment, driver):
    """Without RAY_ADDRESS, as in the guide: `ray start` has left it on every host."""
    known = {name: value for name, value in environment.items() if name != "RAY_ADDRESS"}
    lines = hosts[driver].run([sys.executable, "-c", DRIVER], environment=known).stdout.splitlines()
    assert lines[0].startswith("Joined the Ray cluster at ")
    seats, seen = json.loads(lines[1]), json.loads(lines[2])
    first, second = hosts[driver], hosts[1 - driver]
    assert seats == [[0, 0, 0, first.address, first.name], [1, 1, 0, second.address, second.name]]
    assert seen == [[host.address, host.name, "eth0", True] for host in (first, second)]
    assert "2 CPU ranks on each of 2 machines, but too few nodes have them" in lines[3]
    assert [line.split()[:2] for line in lines[5:7]] == [[host.address, host.name] for host in (first, second)]


def test_a_token_that_is_not_the_clusters_is_refused(hosts, environment, tmp_path):
    (tmp_path / "token").write_text("0" * 64)
    wrong = environment | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}
    assert "refused this command's token" in hosts[1].run([sys.executable, "-c", DRIVER], environment=wrong).stdout


@pytest.mark.parametrize("family", FAMILIES)
def test_a_host_whose_cable_is_cut_is_not_reached_any_more(family, tmp_path):
    with two_hosts(family, tmp_path) as hosts:
        assert connects(hosts)
        hosts[1].cut()
        assert not connects(hosts, timeout=0.5)
        assert hosts[1].run(["true"]).returncode == 0


@pytest.mark.parametrize("family", ["ipv4"])
def test_a_machine_that_is_no_node_of_the_cluster_is_told_how_to_become_one(family, tmp_path):
    with two_hosts(family, tmp_path) as hosts, ray_on(hosts[:1]) as environment:
        told = hosts[1].run([sys.executable, "-c", DRIVER], environment=environment).stdout
        assert f"this machine is not a node of the Ray cluster at {hosts[0].address}:6379" in told
        assert f"`ray start --address='{hosts[0].address}:6379'`" in told


def test_nothing_is_left_of_hosts_whatever_ended_the_test(tmp_path):
    running = []

    def interrupted() -> None:
        with two_hosts("ipv4", tmp_path) as hosts:
            running.extend(host.start(["sleep", "600"], tmp_path / "log") for host in hosts)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert all(process.wait(10) for process in running)
