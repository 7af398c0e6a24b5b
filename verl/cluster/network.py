"""Addresses of this machine: which interface owns one, a port on it, and how an address is written."""

from __future__ import annotations

import ipaddress
import socket

import psutil

from verl.errors import UserError


def is_ipv6(address: str) -> bool:
    return _parsed(address).version == 6


def host_port(address: str, port: int) -> str:
    """``10.94.16.4:6379``, ``[fd94:16::4]:6379``."""
    return f"[{address}]:{port}" if is_ipv6(address) else f"{address}:{port}"


def free_port(address: str) -> int:
    """A port of ``address`` that nobody listens on now. Another process may take it before its use."""
    with listener(address) as probe:
        return probe.getsockname()[1]


def listener(address: str) -> socket.socket:
    """Listens on a free port of ``address`` alone."""
    server = socket.socket(socket.AF_INET6 if is_ipv6(address) else socket.AF_INET)
    server.bind((address, 0))
    server.listen()
    return server


def interface_of(address: str) -> str:
    """The network interface of this machine that owns ``address``: what GLOO_SOCKET_IFNAME takes. Raises UserError."""
    wanted, seen = _parsed(address), []
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6):
                if _parsed(entry.address) == wanted:
                    return interface
                seen.append(f"{entry.address} ({interface})")
    raise UserError(f"no network interface of this machine has the address {address}; it has {', '.join(seen)}")


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])  # fe80::1%eth0: the scope is no part of the address
