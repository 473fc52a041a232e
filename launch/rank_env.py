"""The environment of a rank: torch's standard variables and what keeps a machine's ranks out of each other's way."""

from collections.abc import Mapping
from dataclasses import dataclass

from launch.cluster import ClusterConfig


@dataclass(frozen=True)
class Place:
    """A rank's place among all ranks, and where rank 0 listens."""

    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    master_address: str
    master_port: int


def rank_environment(
    inherited: Mapping[str, str], place: Place, cluster: ClusterConfig, *, launcher: str, interface: str
) -> dict[str, str]:
    """The inherited environment with a rank's place in it. interface: what it listens on, unless the cluster file says so itself.

    The cluster file bounds every pool of compute threads and adds variables of its own."""
    return {
        **inherited,
        "RANK": str(place.rank),
        "LOCAL_RANK": str(place.local_rank),
        "LOCAL_WORLD_SIZE": str(place.local_world_size),
        "WORLD_SIZE": str(place.world_size),
        "MASTER_ADDR": place.master_address,
        "MASTER_PORT": str(place.master_port),
        "OMP_NUM_THREADS": str(cluster.threads_per_rank),
        "MKL_NUM_THREADS": str(cluster.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",
        "HALFSTEP_LAUNCHER": launcher,
        "HALFSTEP_TIMEOUT_SECONDS": str(cluster.collective_timeout_seconds),
        **{name: str(value) for name, value in cluster.environment.items()},
    }
