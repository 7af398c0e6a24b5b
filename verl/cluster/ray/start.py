"""To be part of a Ray cluster: of one that runs, or of one that starts here and ends with the run.

A running cluster is joined where ``ray_kwargs.ray_init.address`` or RAY_ADDRESS names one, or where ``ray start`` left
its address on this machine, as ``ray.init`` does. Otherwise Ray starts here, for nobody else: it listens on the
loopback address, asks for a token that only this user can read, and keeps its files in a folder that goes with it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._private import ray_constants, services
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

from verl.cluster.network import is_ipv6
from verl.errors import UserError

Note = Callable[[str], None]

REACH_TIMEOUT = 20.0  # seconds until a cluster's address answers
NODE_TIMEOUT = 5.0  # seconds until this machine's own node shows, after its `ray start`
# How often Ray tries to be let in where something answers. Its own 20 are as many seconds, and lines of noise.
JOINING: dict[str, str | None] = {"RAY_gcs_server_port_wait_time_s": "2"}
LONGEST_TEMP = 36  # characters: the paths of Ray's sockets are longer by 65, and may have 107
SMALLEST_STORE = 128 << 20  # bytes of /dev/shm, below which Ray's objects are in files
KEY = "ray_kwargs.ray_init"
# Arguments of ray.init about a node that it starts; the nodes of a running cluster have their own.
OF_A_START = (
    "num_cpus",
    "num_gpus",
    "resources",
    "labels",
    "object_store_memory",
    "include_dashboard",
    "dashboard_host",
    "dashboard_port",
    "_system_config",
    "_node_name",
    "_enable_object_reconstruction",
    "_memory",
    "_plasma_directory",
    "_object_spilling_directory",
)
TOKEN_HELP = (
    "RAY_AUTH_MODE and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) have to be the same for `ray start` on every node and "
    "for this command. If you use no tokens: a file ~/.ray/auth_token, which an earlier program may have left, "
    "switches `ray start --head` to tokens; remove it, or set RAY_AUTH_MODE=token everywhere and copy the file to "
    "every node, and start Ray again (docs/ray.md)"
)


@dataclass(frozen=True)
class RaySettings:
    """address: of a running cluster, from RAY_ADDRESS; None where it names none. init: arguments of ray.init that the
    user set. devices: that the run needs on each node."""

    address: str | None
    init: dict[str, Any]
    devices: int


@contextlib.contextmanager
def connected(settings: RaySettings, note: Note) -> Iterator[None]:
    """Part of a cluster until the end of the block. What was joined goes on without us, what was started here ends.

    note: takes lines for the user. Raises UserError where Ray does not start or cannot be joined.
    """
    running = _running_cluster(settings, note)
    with _started(settings, note) if running is None else _joined(running, settings, note):
        yield


# ---- a running cluster


@dataclass(frozen=True)
class Running:
    """A cluster that answers at ``address``. found: where `ray start` left it; otherwise the user named it."""

    address: str
    found: bool

    def __str__(self) -> str:
        return f"the Ray cluster at {self.address}" + (
            " (which `ray start` left on this machine)" if self.found else ""
        )


def _running_cluster(settings: RaySettings, note: Note) -> Running | None:
    asked = settings.init.get("address") or settings.address
    if asked == "local":
        return None
    if asked and asked != "auto":
        if not _answers(*_host_and_port(asked), REACH_TIMEOUT):
            raise UserError(
                f"no Ray cluster answers at {asked} (tried for {REACH_TIMEOUT:.0f} s). It is what {_source(settings)} "
                "says: see with `ray status` on the head node whether Ray runs, and whether a firewall is between."
            )
        return Running(asked, found=False)
    left = services.find_bootstrap_address(settings.init.get("_temp_dir"))
    if left and _answers(*_host_and_port(left), 2.0):
        return Running(left, found=True)
    if asked:
        raise UserError(
            f"{_source(settings)} is auto, but no Ray runs on this machine: `ray start` it, or name its address."
        )
    if left:
        note(f"`ray start` once left the address {left} on this machine, but nothing answers there any more.")
    return None


def _source(settings: RaySettings) -> str:
    return f"{KEY}.address" if settings.init.get("address") else "RAY_ADDRESS"


def _host_and_port(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "://" in address:
        raise UserError(
            f"the Ray address {address} is not host:port, such as 10.94.16.4:6379. (Ray Client, ray://, is of no use "
            "here: this command runs on a node of the cluster.)"
        )
    if _is_ipv6(address) or _is_ipv6(host):
        example = f"[{host}]:{port}" if _is_ipv6(host) and len(port) >= 4 else f"[{address}]:6379"
        raise UserError(f"the IPv6 address in the Ray address {address} needs brackets, such as {example}.")
    if not host or not port.isdigit():
        raise UserError(f"the Ray address {address!r} is not host:port, such as 10.94.16.4:6379.")
    return host.strip("[]"), int(port)


def _is_loopback(address: str) -> bool:
    host, _ = _host_and_port(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _is_ipv6(text: str) -> bool:
    try:
        return is_ipv6(text)
    except ValueError:
        return False


def _answers(host: str, port: int, patience: float) -> bool:
    deadline = time.monotonic() + patience
    while True:
        try:
            socket.create_connection((host, port), timeout=max(deadline - time.monotonic(), 0.5)).close()
            return True
        except OSError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.5)


@contextlib.contextmanager
def _joined(cluster: Running, settings: RaySettings, note: Note) -> Iterator[None]:
    given = {name: value for name, value in settings.init.items() if name not in OF_A_START}
    for name in sorted(settings.init.keys() - given.keys()):
        note(f"{KEY}.{name} has no effect: Ray runs already, and its nodes are as `ray start` made them.")
    _require_node(cluster)
    address = None if cluster.found else cluster.address  # for None, Ray looks for a token where `ray start` does
    with contextlib.ExitStack() as stack:
        stack.enter_context(_environment(JOINING))
        if _is_loopback(cluster.address):
            stack.enter_context(_on_loopback())
        stack.callback(ray.shutdown)
        try:
            _init(**{"log_to_driver": False, "logging_level": logging.WARNING, **given, "address": address})
        except Exception as error:
            raise UserError(_why_not_joined(error, cluster, given)) from error
        note(f"Joined {cluster}.")
        yield


def _require_node(cluster: Running) -> None:
    """Ray looks for the node of this machine among its processes, too, but for a minute."""
    deadline = time.monotonic() + NODE_TIMEOUT
    while not services.find_node_ids():
        if time.monotonic() > deadline:
            raise UserError(_not_a_node(cluster))
        time.sleep(0.25)


def _not_a_node(cluster: Running) -> str:
    return (
        f"this machine is not a node of {cluster}: run `ray start --address='{cluster.address}'` here, or this command "
        "on a node."
    )


def _why_not_joined(error: Exception, cluster: Running, given: dict[str, Any]) -> str:
    text = _whole(error)
    if "AuthenticationError" in text or "InvalidAuthToken" in text:
        return f"{cluster} refused this command's token: {TOKEN_HELP}."
    if "Version mismatch" in text:
        return f"{cluster} has another version: {error} Install the same Python and ray on all machines."
    if "No node info found" in text:
        return _not_a_node(cluster)
    return f"could not join {cluster}{_with(given)}: {type(error).__name__}: {error}"


def _with(arguments: dict[str, Any]) -> str:
    return f" with {KEY}={arguments}" if arguments else ""


def _whole(error: BaseException | None) -> str:
    """Its text and that of what caused it."""
    texts = []
    while error is not None:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


# ---- a cluster of our own


@contextlib.contextmanager
def _started(settings: RaySettings, note: Note) -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="verl-ray-", dir=_short_temp_dir()))  # mode 0700
    defaults = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.WARNING,
        "num_cpus": max(len(os.sched_getaffinity(0)), settings.devices),
        "_temp_dir": str(folder / "ray"),  # which Ray opens to everybody
        **_object_store(note),
    }
    given = {name: value for name, value in settings.init.items() if value is not None}
    with contextlib.ExitStack() as removal, contextlib.ExitStack() as stack:
        removal.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.enter_context(_environment({"RAY_ADDRESS": None, "RAY_USAGE_STATS_ENABLED": "0", **_token(folder)}))
        if "_node_ip_address" not in given:
            stack.enter_context(_on_loopback())
        stack.callback(ray.shutdown)
        try:
            _init(**{**defaults, **given, "address": "local"})
        except Exception as error:
            removal.pop_all()  # for Ray's logs
            why = f"{type(error).__name__}: {error}"
            logs = given.get("_temp_dir", defaults["_temp_dir"])
            raise UserError(f"Ray could not be started here{_with(given)}: {why} (Its logs: {logs})") from error
        cpus, gpus = (ray.cluster_resources().get(name, 0) for name in ("CPU", "GPU"))
        note(f"Started Ray on this machine, for this run only ({cpus:g} CPUs, {gpus:g} GPUs).")
        yield


def _token(folder: Path) -> dict[str, str | None]:
    """The environment by which our Ray asks for a token of its own. Without a file of ours, Ray would write one to
    ~/.ray/auth_token, which changes what a later ``ray start --head`` does."""
    mode = os.environ.get("RAY_AUTH_MODE")
    given = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    if mode and (given or mode.lower() != "token"):
        return {}
    path = folder / "token"
    path.touch(mode=0o600)
    path.write_text(secrets.token_hex(32))
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": None, "RAY_AUTH_TOKEN_PATH": str(path)}


@contextlib.contextmanager
def _environment(values: dict[str, str | None]) -> Iterator[None]:
    """Environment variables for the block; Ray reads those about tokens again, before and after it."""
    before = {name: os.environ.get(name) for name in {*values, "RAY_AUTH_MODE"}}
    _set_environment(values)
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # In this order: Ray ends the process that looks for a token in token mode and finds none.
    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """On Linux, Ray reads 127.0.0.1 as an address of the machine's network, and then all of its processes listen on
    every interface. On a Mac it takes it as it is, and they listen there only: this is the switch between the two."""
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _short_temp_dir() -> str:
    chosen = tempfile.gettempdir()
    return chosen if len(chosen) <= LONGEST_TEMP - len("/verl-ray-12345678") else "/tmp"


def _object_store(note: Note) -> dict[str, Any]:
    """Ray takes 30 % of the memory that is free, in files where /dev/shm has less: rather a smaller store, if that is
    of use at all."""
    room = int(psutil.disk_usage("/dev/shm").free * 0.9)
    if room >= 0.3 * psutil.virtual_memory().available:
        return {}
    kept = room >= SMALLEST_STORE
    where = f"Ray keeps {room >> 20} MiB of objects" if kept else "Ray keeps its objects in files, which is slow"
    note(f"/dev/shm has room for {room >> 20} MiB: {where}. In Docker, --shm-size makes more.")
    return {"object_store_memory": room} if kept else {}


def _init(**arguments: Any) -> None:
    """``ray.init``, without its SIGTERM handler in place of ours."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**arguments)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, before)
