"""Two hosts on this machine, for tests of what happens between machines: each has its own network, host name, process
numbers, /dev/shm, /tmp/ray and home, and a cable to the other. Needs root; what is left of a test run that was killed
ends with it.

    with two_hosts("ipv4", tmp_path) as hosts, ray_on(hosts) as environment:
        hosts[0].run([sys.executable, script], environment=environment)
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from helpers import ROOT

ADDRESSES = {"ipv4": ("10.94.16.4", "10.94.16.5"), "ipv6": ("fd94:16::4", "fd94:16::5")}
GATEWAY = {"ipv4": "10.94.16.1", "ipv6": "fd94:16::1"}
PREFIX = {"ipv4": 24, "ipv6": 64}
PORT = 6379
NAMESPACES = ["--mount", "--uts", "--net", "--pid"]
RAY = str(Path(sys.executable).with_name("ray"))

# The first process of a host. It waits for the end of its standard input, which is that of the test run at the latest;
# the system ends all others of the host with it. Children that it inherits are no zombies, as it ignores their end.
FIRST_PROCESS = """
set -e
mount --make-rprivate /
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp/ray
mount --bind {hosts_file} /etc/hosts
echo {name} >/proc/sys/kernel/hostname
exec {python} -Ic {wait}
"""
WAIT = "import signal, sys; signal.signal(signal.SIGCHLD, signal.SIG_IGN); print('ready', flush=True); sys.stdin.read()"


def can_make_hosts() -> str | None:
    """Why not, or None."""
    if os.geteuid() != 0:
        return "hosts need root"
    if missing := [tool for tool in ("unshare", "nsenter", "mount") if not shutil.which(tool)]:
        return f"hosts need {', '.join(missing)} (util-linux)"
    try:
        import pyroute2  # noqa: F401
    except ImportError:
        return "hosts need pyroute2"
    tried = subprocess.run(["unshare", *NAMESPACES, "--fork", "true"], capture_output=True, text=True)
    return f"this machine allows no namespaces: {tried.stderr.strip()}" if tried.returncode else None


class HostProcess(subprocess.Popen):
    """A command on a host. It is the child of the process that this is: signals go to it, and its end is this one's."""

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(OSError):
                os.kill(_child_of(self.pid) or self.pid, number)


def _child_of(pid: int) -> int | None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0]) if children else None


class Host:
    """address: of its network interface eth0. folder: its own, with its home."""

    def __init__(self, name: str, address: str, folder: Path):
        self.name, self.address, self.folder = name, address, folder
        (folder / "home").mkdir(parents=True, exist_ok=True)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {name}\n")  # as Debian does
        Path("/tmp/ray").mkdir(exist_ok=True)  # for the host's own to be mounted on
        words = {"hosts_file": folder / "hosts", "name": name, "python": sys.executable, "wait": WAIT}
        setup = FIRST_PROCESS.format(**{key: shlex.quote(str(word)) for key, word in words.items()})
        self._holder = subprocess.Popen(
            ["unshare", *NAMESPACES, "--fork", "--kill-child", "--mount-proc", "sh", "-c", setup],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            assert self._holder.stdout.readline() == b"ready\n", f"could not set up host {name}"
            self.first = _child_of(self._holder.pid)
        except BaseException:
            self.close()
            raise

    def environment(self) -> dict[str, str]:
        """Of the commands that run here: the test run's, without what says how to reach a Ray of its own."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return kept | {"HOME": str(self.folder / "home")}

    def run(
        self, command: Sequence[str], timeout: float = 60, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The finished command, its output as text. Raises TimeoutExpired, with the output until then."""
        process = self._popen(command, environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            output, _ = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(command), process.returncode, output)

    def start(self, command: Sequence[str], log: Path, environment: Mapping[str, str] | None = None) -> HostProcess:
        with log.open("wb") as output:
            return self._popen(command, environment, stdout=output, stderr=subprocess.STDOUT)

    def _popen(self, command: Sequence[str], environment: Mapping[str, str] | None, **streams) -> HostProcess:
        enter = ["nsenter", f"--target={self.first}", *NAMESPACES, "--", "env", "-C", str(ROOT)]
        return HostProcess(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            env=self.environment() | dict(environment or {}),
            start_new_session=True,
            **streams,
        )

    def kill(self) -> None:
        """End every process at once. The system still closes their connections: ``cut`` first for a loss of power. The
        host itself stays, and can be given new ones."""
        self._popen(["sh", "-c", "kill -KILL -1"], None).wait(30)

    def cut(self) -> None:
        """Unplug the cable: what is sent in either direction is lost, and nobody is told."""
        with self._links() as links:
            links.link("set", index=links.link_lookup(ifname="eth0")[0], state="down")

    def plug_in(self, family: Literal["ipv4", "ipv6"]) -> None:
        with self._links() as links:
            links.link("set", index=links.link_lookup(ifname="lo")[0], state="up")
            cable = links.link_lookup(ifname="eth0")[0]
            nodad = {"flags": 2} if family == "ipv6" else {}  # IFA_F_NODAD: usable at once
            links.addr("add", index=cable, address=self.address, prefixlen=PREFIX[family], **nodad)
            links.link("set", index=cable, state="up")
            # To nowhere: what has a default route finds its own address, as on a real network.
            links.route("add", dst="default", gateway=GATEWAY[family], oif=cable)

    def _links(self):
        from pyroute2 import IPRoute

        return IPRoute(netns=f"/proc/{self.first}/ns/net")

    def close(self) -> None:
        self._holder.stdin.close()  # which ends the first process, and so all
        try:
            self._holder.wait(30)
        finally:
            self._holder.kill()
            self._holder.stdout.close()


@contextlib.contextmanager
def two_hosts(family: Literal["ipv4", "ipv6"], folder: Path) -> Iterator[list[Host]]:
    """ipv6: they have no IPv4 address but the loopback's. folder: for their files."""
    from pyroute2 import IPRoute

    with contextlib.ExitStack() as stack:
        hosts = []
        for number, address in enumerate(ADDRESSES[family]):
            hosts.append(Host(f"node{number}", address, folder / f"node{number}"))
            stack.callback(hosts[-1].close)
        one, other = hosts
        with IPRoute() as links:
            end = {"ifname": "eth0", "net_ns_pid": other.first}
            links.link("add", kind="veth", ifname="eth0", net_ns_pid=one.first, peer=end)
        for host in hosts:
            host.plug_in(family)
        yield hosts


@contextlib.contextmanager
def ray_on(hosts: Sequence[Host], cpus: int = 1, token: bool = True) -> Iterator[dict[str, str]]:
    """Ray as the guide starts it, the first host being its head. Gives the environment for commands that join it.

    cpus: of each host. token: whether it asks for one.
    """
    environment = {"RAY_USAGE_STATS_ENABLED": "0", "OMP_WAIT_POLICY": "passive", "RAY_AUTH_MODE": "disabled"}
    if token:
        file = hosts[0].folder.parent / "token"
        file.touch(mode=0o600)
        file.write_text(secrets.token_hex(32))
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(file)}
    head = f"[{hosts[0].address}]:{PORT}" if ":" in hosts[0].address else f"{hosts[0].address}:{PORT}"
    roles = [["--head", f"--port={PORT}", "--include-dashboard=false"]] + [[f"--address={head}"]] * (len(hosts) - 1)
    size = [f"--num-cpus={cpus}", "--object-store-memory=100000000"]
    try:
        for host, role in zip(hosts, roles, strict=True):
            command = [RAY, "start", *role, f"--node-ip-address={host.address}", *size, "--block"]
            log = host.folder / "ray.log"
            process = host.start(command, log, environment)
            # One after the other: a node that finds no head tries again after many seconds only.
            _wait_until(lambda log=log: "Ray runtime started" in log.read_text(), process, log)
        environment["RAY_ADDRESS"] = head
        _wait_until(lambda: _nodes(hosts[0], environment) == len(hosts), process, log)
        yield environment
    finally:
        for host in hosts:
            host.kill()


def _nodes(host: Host, environment: Mapping[str, str]) -> int:
    """That ``ray status`` shows: a new one a second or two late."""
    return host.run([RAY, "status"], environment=environment).stdout.count(" node_")


def _wait_until(done: Callable[[], bool], process: HostProcess, log: Path) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert process.poll() is None, f"ray start ended: {log.read_text()}"
        assert time.monotonic() < deadline, f"Ray is not on all hosts: {log.read_text()}"
        time.sleep(0.25)
