"""Addresses, interfaces and ports: where the ranks of several machines find each other."""

import errno
import fcntl
import socket
import struct
from collections.abc import Sequence

_SIOCGIFADDR = 0x8915
LOOPBACK = "127.0.0.1"


def address_towards(host: str) -> str:
    """This machine's IPv4 address as `host` sees it; nothing is sent.

    Raises: ValueError if the name or address cannot be reached from here."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return probe.getsockname()[0]
    except OSError as error:
        raise ValueError(f"{socket.gethostname()}: no way to {host}: {error}; set cluster.network_interface") from error


def address_of(interface: str) -> str:
    """The IPv4 address of an interface of this machine.

    Raises: ValueError listing the interfaces there are."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            packed = fcntl.ioctl(any_socket.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()))
        except OSError:
            names = ", ".join(name for _, name in socket.if_nameindex())
            text = f"{socket.gethostname()} has no interface '{interface}' with an IPv4 address; it has {names}"
            raise ValueError(f"{text}; set cluster.network_interface to one that every node has") from None
    return socket.inet_ntoa(packed[20:24])


def interface_of(address: str) -> str:
    """The interface of this machine that holds an IPv4 address.

    Raises: ValueError if none does."""
    if address.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        try:
            if address_of(name) == address:
                return name
        except ValueError:
            continue
    raise ValueError(f"{socket.gethostname()}: no interface has the address {address}; set cluster.network_interface")


def rank_interface(master_address: str, chosen: str | None) -> str:
    """The interface that a rank listens on: loopback where rank 0 does, else the chosen one, else the one that leads to rank 0.

    Raises: ValueError as address_towards and interface_of."""
    leads = interface_of(address_towards(master_address))
    return leads if leads == "lo" else chosen or leads


def reserve_port(address: str, ports: Sequence[int], *, start: int = 0) -> socket.socket:
    """A socket bound to a free port of the range (first, last), which a process of the same user may still listen on.

    start: where in the range to begin, so that jobs on one machine do not all try the same ports.
    Raises: ValueError if every port of the range is taken, or this machine does not have the address."""
    first, last = ports
    count = last - first + 1
    for number in range(count):
        reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            reserved.bind((address, first + (start + number) % count))
        except OSError as error:
            reserved.close()
            if error.errno == errno.EADDRINUSE:
                continue
            text = f"{socket.gethostname()}: does not have the address {address}: {error.strerror}; set cluster.network_interface"
            raise ValueError(text) from error
        # Bound alone, so that no other job can reserve it; from now on rank 0 may listen there, because it sets this too.
        # Nothing reaches a socket that does not listen.
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        return reserved
    raise ValueError(f"{socket.gethostname()}: no free port on {address} from {first} to {last}; set cluster.rendezvous_ports")
