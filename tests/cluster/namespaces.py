"""Hosts that only a network connects: network namespaces on a bridge, which can be cut off and joined again; takes root."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.slurm_cluster import Host

_BRIDGE = "hsbr0"
CONTROLLER = "10.213.77.1"


@dataclass(frozen=True)
class Network:
    """Hosts n1, n2, ... with addresses of their own."""

    hosts: list[Host]

    def cut(self, number: int) -> None:
        """Take host nNUMBER off the network; nobody is told."""
        _ip("link", "set", f"hsv{number}", "down")

    def heal(self, number: int) -> None:
        """Put it back."""
        _ip("link", "set", f"hsv{number}", "up")


def not_possible() -> str:
    """Why there can be no namespaces here; empty where there can."""
    tried = subprocess.run(["ip", "netns", "add", "hs-try"], capture_output=True, text=True, check=False)
    if tried.returncode:
        return tried.stderr.strip()
    _ip("netns", "del", "hs-try")
    return ""


@contextmanager
def network(folder: Path, count: int = 2) -> Iterator[Network]:
    """So many hosts on a bridge, which is the controller's side of the network."""
    names = "\n".join(["127.0.0.1 localhost", *(f"{_address(number)} n{number}" for number in range(1, count + 1))])
    (folder / "hosts").write_text(f"{names}\n")
    try:
        _ip("link", "add", _BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{CONTROLLER}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        for number in range(1, count + 1):
            _add_host(number)
        yield Network([Host(f"n{number}", _address(number), _prefix(number, folder)) for number in range(1, count + 1)])
    finally:
        for number in range(1, count + 1):
            subprocess.run(["ip", "netns", "del", f"hs{number}"], capture_output=True, check=False)
            subprocess.run(["ip", "link", "del", f"hsv{number}"], capture_output=True, check=False)
        subprocess.run(["ip", "link", "del", _BRIDGE], capture_output=True, check=False)


def _add_host(number: int) -> None:
    name, link = f"hs{number}", f"hsv{number}"
    _ip("netns", "add", name)
    _ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", name)
    _ip("link", "set", link, "master", _BRIDGE, "up")
    _ip("-n", name, "addr", "add", f"{_address(number)}/24", "dev", "eth0")
    _ip("-n", name, "link", "set", "eth0", "up")
    _ip("-n", name, "link", "set", "lo", "up")


def _prefix(number: int, folder: Path) -> tuple[str, ...]:
    """Words that start a program on a host; not `ip netns exec`, which mounts a /sys without cgroups."""
    setup = f'hostname n{number}; mount --bind {folder / "hosts"} /etc/hosts; exec "$@"'
    return ("nsenter", f"--net=/run/netns/hs{number}", "unshare", "--uts", "--mount", "bash", "-c", setup, "on-host")


def _address(number: int) -> str:
    return f"10.213.77.{10 + number}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"
