"""Inside a Ray worker: agree on where rank 0 listens, then be the parent of one ordinary rank. Free of torch."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

import ray
import ray.train
from ray.train._internal.base_worker_group import BaseWorkerGroup
from ray.train.backend import Backend, BackendConfig

from launch.cluster import RayCluster
from launch.job import Job
from launch.logs import rank_log
from launch.network import LOOPBACK, address_of, address_towards, rank_interface, reserve_port
from launch.place import Place
from launch.rank_env import rank_environment
from trainer.exit_codes import CALL_AGAIN, DONE, PEER_LOST
from trainer.stop import STOP_SIGNALS

_LOOK_SECONDS = 1.0
_LEAVE_SECONDS = 10.0
"""What the other ranks get to leave by themselves after one that only says that its peers are gone."""

# The rank dies with its Ray worker, whatever ends that one; a wrapper, because Python is not to run between fork and exec here.
_TIED = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
os.getppid() == int(sys.argv[1]) or os._exit(70)
os.execv(sys.argv[2], sys.argv[2:])
"""


@final
@dataclass(frozen=True)
class Attempt:
    """What every worker of an attempt is told."""

    job: Job
    cluster: RayCluster
    job_id: str
    refusal: Path
    """Where rank 0 says that it was not allowed to begin."""
    placed: Path
    """What rank 0's worker makes once the attempt has its machines."""
    umask: int
    """Of the command: Ray's own may be stricter."""


@final
class RankFailed(Exception):
    """A rank ended with an exit code that ends the others too."""

    def __init__(self, rank: int, node: str, code: int) -> None:
        super().__init__(rank, node, code)
        self.rank, self.node, self.code = rank, node, code

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.node} ended with exit code {self.code}"


@final
class Meeting(BackendConfig):
    """How workers learn where rank 0 listens; torch's process group is the ranks' own, one process further down."""

    backend = "of the ranks"
    """TorchTrainer wants one that is set; nothing else asks."""

    def __init__(self, cluster: RayCluster) -> None:
        self.cluster = cluster

    @property
    def backend_cls(self) -> type[Backend]:
        return _MeetingBackend


class _MeetingBackend(Backend):
    share_cuda_visible_devices = True
    """LOCAL_RANK picks among the GPUs of its node, as on any launcher."""

    def on_start(self, worker_group: BaseWorkerGroup, backend_config: BackendConfig) -> None:
        assert isinstance(backend_config, Meeting), "the config that brought this backend"
        nodes: list[str] = worker_group.execute(ray.util.get_node_ip_address)
        other = next((node for node in nodes if node != nodes[0]), None)
        variables = worker_group.execute_single(0, _reserve, backend_config.cluster, other)
        worker_group.execute(_meet, variables)


def _reserve(cluster: RayCluster, other: str | None) -> dict[str, str]:
    """On the node of rank 0: a port that nobody else takes as long as this worker lives. other: one of the other nodes."""
    address = LOOPBACK
    if other is not None:
        address = address_of(cluster.network_interface) if cluster.network_interface else address_towards(other)
    reserved = reserve_port(address, cluster.rendezvous_ports, start=os.getpid())
    port = reserved.getsockname()[1]
    reserved.detach()
    return {"MASTER_ADDR": address, "MASTER_PORT": str(port)}


def _meet(variables: dict[str, str]) -> None:
    os.environ.update(variables)


def run_rank(config: dict[str, Attempt]) -> int:
    """The train function of Ray Train: start this worker's rank and wait for it; returns 0 (done) or 75 (to be called again).

    Raises: RankFailed for any other exit code, on which Ray ends the other workers."""
    attempt, context = config["attempt"], ray.train.get_context()
    os.umask(attempt.umask)
    place = Place(
        rank=context.get_world_rank(),
        local_rank=context.get_local_rank(),
        local_world_size=context.get_local_world_size(),
        world_size=context.get_world_size(),
        master_address=os.environ["MASTER_ADDR"],
        master_port=int(os.environ["MASTER_PORT"]),
    )
    code = _wait(_start(attempt, place), on_drain=place.local_rank == 0)
    if code in (DONE, CALL_AGAIN):
        return code
    raise RankFailed(place.rank, ray.util.get_node_ip_address(), code)


def _start(attempt: Attempt, place: Place) -> subprocess.Popen[bytes]:
    cluster, run_dir = attempt.cluster, attempt.job.path
    interface = rank_interface(place.master_address, cluster.network_interface)
    environment = rank_environment(_inherited(cluster), place, cluster, launcher="ray", interface=interface)
    environment["HALFSTEP_JOB_ID"] = attempt.job_id
    if place.rank == 0:
        environment["HALFSTEP_REFUSAL"] = str(attempt.refusal)
    seen = run_dir.is_dir()  # where it is not, the ranks find out together
    if place.rank == 0 and seen:
        attempt.placed.touch()
    command = [sys.executable, "-I", "-S", "-c", _TIED, str(os.getpid()), *attempt.job.command(cluster.python or sys.executable)]
    with _output(run_dir if seen else None, place.rank) as output:
        # Inherited by the rank, which lets them in when it can answer them. This thread has no other use for them.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        return subprocess.Popen(
            command, env=environment, cwd=run_dir if seen else None, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )


def _inherited(cluster: RayCluster) -> dict[str, str]:
    """The worker's environment without Ray's token, and without GPUs where the cluster file asks for none."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_TOKEN"}
    if cluster.gpus_per_rank == 0:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


@contextmanager
def _output(run_dir: Path | None, rank: int) -> Iterator[int | None]:
    """Where a rank's output goes: rank 0's to the worker's, which Ray shows, the others' to their log file."""
    if rank == 0 or run_dir is None:
        yield None
        return
    log = rank_log(run_dir, rank)
    try:
        yield log
    finally:
        os.close(log)


def _wait(process: subprocess.Popen[bytes], *, on_drain: bool) -> int:
    """The rank's exit code. on_drain: ask it to stop as soon as Ray is to take this node away; ranks stop together."""
    told = not on_drain
    while True:
        try:
            code = process.wait(None if told else _LOOK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            if _is_draining():
                process.send_signal(signal.SIGTERM)
                told = True
    if code == PEER_LOST:
        # A rank at fault is to be seen first, and ranks may still be writing stacks: Ray ends all workers when one fails.
        threading.Event().wait(_LEAVE_SECONDS)
    return code


def _is_draining() -> bool:
    """Whether this node is to be taken away; asked of the same state as Ray Train's own watcher, which only notes it."""
    # Imported here: private, and the only use of it.
    from ray._private.state import state

    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()
