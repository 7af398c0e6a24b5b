"""The memory that a process may have, with cgroups that the test writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from verl import machine
from verl.machine import HostMemory, host_memory

GB = 10**9


@pytest.fixture
def read(tmp_path, monkeypatch) -> Callable[..., HostMemory]:
    """On a machine of 100 GB of which 80 are available. own: /proc/self/cgroup; files: below /sys/fs/cgroup."""
    memory = SimpleNamespace(available=80 * GB, total=100 * GB)
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: memory)

    def read(own: str, files: dict[str, str]) -> HostMemory:
        for name, text in files.items():
            file = tmp_path / "cgroup" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        (tmp_path / "own").write_text(own)
        return host_memory(tmp_path / "cgroup", tmp_path / "own")

    return read


def v2(folder: str, limit: int | str, used: int, inactive: int = 0, active: int = 0) -> dict[str, str]:
    stat = f"anon 5\nfile 9\ninactive_file {inactive}\nactive_file {active}\n"
    texts = {"max": f"{limit}\n", "current": f"{used}\n", "stat": stat}
    return {f"{folder}memory.{name}": text for name, text in texts.items()}


def v1(folder: str, limit: int, used: int, cached: int = 0) -> dict[str, str]:
    stat = f"cache 1\ninactive_file 1\nactive_file 1\ntotal_inactive_file {cached}\ntotal_active_file 0\n"
    texts = {"limit_in_bytes": f"{limit}\n", "usage_in_bytes": f"{used}\n", "stat": stat}
    return {f"memory/{folder}memory.{name}": text for name, text in texts.items()}


WHOLE = HostMemory(80 * GB, 100 * GB)


def test_a_containers_limit_counts_where_it_is_lower(read):
    assert read("0::/\n", v2("", 50 * GB, 20 * GB)) == HostMemory(30 * GB, 50 * GB, limited=True)


def test_files_that_the_kernel_keeps_in_memory_are_not_used(read):
    found = read("0::/\n", v2("", 50 * GB, 20 * GB, inactive=4 * GB, active=3 * GB))
    assert found.available == 37 * GB


def test_the_limit_of_an_outer_cgroup_counts_too(read):
    files = v2("jobs/", 40 * GB, 25 * GB) | v2("jobs/7/", "max", 2 * GB) | v2("jobs/7/task/", 60 * GB, 1 * GB)
    assert read("0::/jobs/7/task\n", files) == HostMemory(15 * GB, 40 * GB, limited=True)


def test_a_cgroup_that_is_not_visible_from_here_is_the_outermost_that_is(read):
    assert read("0::/kubepods/pod7\n", v2("", 50 * GB, 20 * GB)).available == 30 * GB


def test_cgroups_of_version_1(read):
    own = "3:cpuset:/other\n4:memory:/docker/7\n0::/\n"
    files = v1("", 2**63 - 4096, 60 * GB) | v1("docker/7/", 50 * GB, 20 * GB, cached=5 * GB)
    assert read(own, files) == HostMemory(35 * GB, 50 * GB, limited=True)


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/\n", {}),
        ("0::/\n", v2("", "max", 20 * GB)),
        ("0::/\n", v2("", 200 * GB, 20 * GB)),
        ("0::/\n", v2("", 99 * GB, 5 * GB)),
        ("4:memory:/\n0::/\n", v1("", 2**63 - 4096, 20 * GB)),
        ("0::/\n", {"memory.max": "50", "memory.current": "many", "memory.stat": ""}),
    ],
    ids=["no cgroups", "no limit", "above the machine", "more free than of the machine", "version 1", "unreadable"],
)
def test_without_a_lower_limit_it_is_the_machines(read, own, files):
    assert read(own, files) == WHOLE


def test_a_cgroup_over_its_limit_has_nothing(read):
    assert read("0::/\n", v2("", 50 * GB, 51 * GB)).available == 0


def test_this_machine_has_some_memory():
    found = host_memory()
    assert 0 < found.available < found.total
    assert host_memory(own=Path("/no/such/file")).total >= found.total
