"""Where ranks find each other: an address, its interface, and a port that nobody else takes in between."""

import socket
from collections.abc import Iterator

import pytest

from launch.network import LOOPBACK, address_of, address_towards, interface_of, rank_interface, reserve_port

_NOBODYS = "192.0.2.199"
"""Of TEST-NET-1 (RFC 5737)."""


@pytest.fixture
def ports() -> Iterator[tuple[int, int]]:
    """First and last of three ports that nobody uses."""
    for first in range(23000, 65000, 3):
        taken = [socket.socket() for _ in range(3)]
        try:
            for number, one in enumerate(taken):
                one.bind((LOOPBACK, first + number))
        except OSError:
            continue
        finally:
            for one in taken:
                one.close()
        yield first, first + 2
        return


def _port(reserved: socket.socket) -> int:
    return reserved.getsockname()[1]


def test_two_reservations_never_share_a_port(ports: tuple[int, int]) -> None:
    reserved = [reserve_port(LOOPBACK, ports) for _ in range(3)]
    assert [_port(one) for one in reserved] == [ports[0], ports[0] + 1, ports[1]]
    with pytest.raises(ValueError, match=rf"no free port on 127.0.0.1 from {ports[0]} to {ports[1]}; set cluster.rendezvous_ports"):
        reserve_port(LOOPBACK, ports)
    reserved[1].close()
    with reserve_port(LOOPBACK, ports) as again:
        assert _port(again) == ports[0] + 1
    for one in reserved:
        one.close()


def test_the_search_begins_where_it_is_told_and_goes_round(ports: tuple[int, int]) -> None:
    with reserve_port(LOOPBACK, ports, start=1_000_001) as first, reserve_port(LOOPBACK, ports, start=1_000_001) as second:
        expected = (1_000_001 % 3, 1_000_002 % 3)
        assert (_port(first) - ports[0], _port(second) - ports[0]) == expected


def test_rank_0_alone_may_listen_on_a_reserved_port(ports: tuple[int, int]) -> None:
    with reserve_port(LOOPBACK, ports) as reserved, socket.socket() as rank_0, socket.socket() as stranger:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(reserved.getsockname())
        with pytest.raises(OSError, match="Address already in use"):
            stranger.bind(reserved.getsockname())
        rank_0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        rank_0.bind(reserved.getsockname())
        rank_0.listen()
        for _ in range(20):  # none of them is lost to the reservation
            with socket.create_connection(reserved.getsockname()) as connection, rank_0.accept()[0] as accepted:
                connection.sendall(b"-")
                assert accepted.recv(1) == b"-"
        with reserve_port(LOOPBACK, ports) as another:
            assert _port(another) == _port(reserved) + 1


def test_the_port_of_a_rank_0_that_has_just_ended_can_be_reserved_again_or_is_passed_over(ports: tuple[int, int]) -> None:
    with reserve_port(LOOPBACK, ports) as reserved, socket.socket() as rank_0:
        rank_0.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        rank_0.bind(reserved.getsockname())
        rank_0.listen()
        connection = socket.create_connection(reserved.getsockname())
        rank_0.accept()[0].close()  # the side that closes first keeps the port busy for a minute
        connection.close()
    with reserve_port(LOOPBACK, ports) as again:
        assert _port(again) in (ports[0], ports[0] + 1)


@pytest.mark.parametrize("address", [_NOBODYS, "no-such-host.invalid"])
def test_an_address_of_another_machine_is_no_question_of_ports(address: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^{socket.gethostname()}: does not have the address {address}: .*; set cluster.network_interface"
    ):
        reserve_port(address, (23000, 23002))


def test_loopback_is_an_interface_with_an_address() -> None:
    assert address_of("lo") == LOOPBACK
    assert interface_of(LOOPBACK) == interface_of("127.0.0.9") == "lo"
    assert address_towards("127.0.0.9") == LOOPBACK


def test_each_address_of_this_machine_leads_back_to_its_interface() -> None:
    for _, name in socket.if_nameindex():
        try:
            address = address_of(name)
        except ValueError:  # an interface without an IPv4 address
            continue
        assert interface_of(address) == name
        assert address_towards(address) in (address, LOOPBACK)


@pytest.mark.parametrize("name", ["nope0", "x" * 300])
def test_an_unknown_interface_lists_those_there_are(name: str) -> None:
    with pytest.raises(ValueError, match=rf"has no interface '{name}' with an IPv4 address; it has .*\blo\b.*; set cluster.network_inter"):
        address_of(name)


def test_an_address_that_no_interface_has_is_said() -> None:
    with pytest.raises(ValueError, match=rf"no interface has the address {_NOBODYS}; set cluster.network_interface"):
        interface_of(_NOBODYS)


def test_a_host_that_cannot_be_found_is_named() -> None:
    with pytest.raises(ValueError, match=r"no way to no-such-host.invalid: .*; set cluster.network_interface"):
        address_towards("no-such-host.invalid")


def test_a_rank_listens_on_loopback_where_rank_0_does_and_else_on_what_was_chosen() -> None:
    assert rank_interface("127.0.0.1", "eth7") == rank_interface("127.0.0.3", None) == "lo"
    try:
        elsewhere = address_towards("192.0.2.1")
    except ValueError:
        pytest.skip("this machine has no network but loopback")
    assert rank_interface(elsewhere, "ib0") == "ib0" and rank_interface(elsewhere, None) == interface_of(elsewhere)
