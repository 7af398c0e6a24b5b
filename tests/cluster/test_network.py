"""Addresses of this machine, and how they are written."""

import socket

import psutil
import pytest

from verl.cluster.network import free_port, host_port, interface_of, is_ipv6, listener
from verl.errors import UserError

LOOPBACKS = [
    address
    for family, address in [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]
    if any(entry.family == family for entries in psutil.net_if_addrs().values() for entry in entries)
]


def test_an_ipv6_address_is_in_brackets_where_a_port_follows():
    assert host_port("10.94.16.4", 6379) == "10.94.16.4:6379"
    assert host_port("fd94:16::4", 6379) == "[fd94:16::4]:6379"
    assert [is_ipv6(address) for address in ("127.0.0.1", "::1", "fe80::1%eth0")] == [False, True, True]


@pytest.mark.parametrize("address", LOOPBACKS)
def test_a_free_port_can_be_listened_on(address):
    port = free_port(address)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, port), family=family) as server:
        assert server.getsockname()[:2] == (address, port)


@pytest.mark.parametrize("address", LOOPBACKS)
def test_the_interface_of_the_loopback_address_is_the_loopback(address):
    assert interface_of(address) == "lo"


def test_every_address_of_this_machine_has_its_interface_however_it_is_written():
    for interface, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET:
                assert interface_of(entry.address) == interface
            if entry.family == socket.AF_INET6 and not entry.address.startswith("fe80"):  # those may be several's
                assert interface_of(entry.address.partition("%")[0].upper()) == interface


def test_an_address_that_this_machine_does_not_have_is_named_with_those_it_has():
    with pytest.raises(UserError, match=r"192\.0\.2\.77.*127\.0\.0\.1 \(lo\)"):
        interface_of("192.0.2.77")


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_listener_is_heard_at_its_address_alone(address):
    with listener(address) as server:
        host, port = server.getsockname()[:2]
        assert host == address
        socket.create_connection((address, port), 5).close()
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.2", port), 5)
