"""A Ray of the tests' own: a head and nodes on loopback addresses of their own, behind a token, ended by their own process ids."""

import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import final

from tests.distributed.runs import descendants

_START_SECONDS = 120.0
_END_SECONDS = 3.0
"""Of an orderly end: a head has been seen to take more than 20 s over one; then its processes are killed."""
_OBJECT_STORE_BYTES = 80 * 2**20
HEAD = "127.0.0.2"


@final
@dataclass(frozen=True)
class RayNode:
    """One machine, as Ray sees it."""

    address: str
    process: subprocess.Popen[bytes]

    def end(self) -> None:
        """Shut it down in an orderly way."""
        family = descendants(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in family:
            _kill(pid)


@final
@dataclass
class RayPool:
    """A head that computes nothing, and nodes that come and go."""

    folder: Path
    port: int
    dashboard: str
    """Where jobs are submitted."""
    nodes: list[RayNode] = field(default_factory=list)
    _number: int = 2

    @property
    def address(self) -> str:
        """Of a driver."""
        return f"{HEAD}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a user of this cluster has set."""
        others = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**others, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.folder / "token"), "RAY_USAGE_STATS_ENABLED": "0"}

    def add_node(self, *, cpus: int = 2) -> RayNode:
        """A further machine, on a loopback address that no other had."""
        self._number += 1
        address = f"127.0.0.{self._number}"
        node = self._start(address, f"--address={self.address}", f"--num-cpus={cpus}")
        self.nodes.append(node)
        return node

    def drain(self, node: RayNode, *, seconds: float) -> None:
        """Announce that a machine is taken away so many seconds from now."""
        found = self.ask(
            f"next(node['NodeID'] for node in ray.nodes() if node['NodeManagerAddress'] == {node.address!r} and node['Alive'])"
        )
        words = ["drain-node", f"--address={self.address}", f"--node-id={found}", "--reason=DRAIN_NODE_REASON_PREEMPTION"]
        words += ["--reason-message=reclaimed", f"--deadline-remaining-seconds={seconds:.0f}"]
        done = subprocess.run(_ray(*words), env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr + done.stdout

    def lose(self, node: RayNode) -> None:
        """As when a machine loses its power: all of its processes are gone at once."""
        self.nodes.remove(node)
        for pid in [node.process.pid, *descendants(node.process.pid)]:
            _kill(pid)
        node.process.wait(_END_SECONDS)

    def remove(self, node: RayNode) -> None:
        """Shut a machine down in an orderly way."""
        self.nodes.remove(node)
        node.end()

    def ask(self, expression: str) -> str:
        """The value of an expression in a driver of this cluster."""
        code = f"import ray; ray.init({self.address!r}, log_to_driver=False, logging_level='ERROR'); print({expression})"
        done = subprocess.run([sys.executable, "-c", code], env=self.environment, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start_head(self) -> None:
        """Raises: AssertionError with Ray's own words if it does not come up."""
        options = [f"--port={self.port}", f"--dashboard-host={HEAD}", f"--dashboard-port={self.dashboard.rpartition(':')[2]}"]
        options += [f"--ray-client-server-port={_free_port()}", f"--temp-dir={self.folder / 'ray'}"]
        self.nodes.append(self._start(HEAD, "--head", "--num-cpus=0", *options))

    def end(self) -> None:
        """End all machines, the head last."""
        for node in reversed(self.nodes):
            if node.process.poll() is None:
                node.end()

    def _start(self, address: str, *options: str) -> RayNode:
        # Agents of several nodes also meet on 127.0.0.1, where the second one to take a port does without it, and without jobs.
        options = (*options, f"--dashboard-agent-listen-port={_free_port()}", f"--object-store-memory={_OBJECT_STORE_BYTES}")
        words = ["start", "--block", f"--node-ip-address={address}", *options]
        log = self.folder / f"{address}.log"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                _ray(*words),
                env=self.environment | {"RAY_ADDRESS": self.address},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        deadline = time.monotonic() + _START_SECONDS
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        return RayNode(address, process)


@contextmanager
def ray_pool(*, nodes: int) -> Iterator[RayPool]:
    """A head and so many nodes of two processors. Sockets want a short path, so the folder lies in /tmp."""
    with tempfile.TemporaryDirectory(prefix="ray_", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "token").write_text(secrets.token_hex(32))
        (folder / "token").chmod(0o600)
        pool = RayPool(folder, _free_port(), f"http://{HEAD}:{_free_port()}")
        try:
            pool.start_head()
            for _ in range(nodes):
                pool.add_node()
            yield pool
        finally:
            pool.end()


def _ray(*words: str) -> list[str]:
    return [sys.executable, "-m", "ray.scripts.scripts", *words]


def _free_port() -> int:
    with socket.create_server((HEAD, 0)) as found:
        return found.getsockname()[1]


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
