"""The environment of a rank: its place, and what keeps a machine's ranks out of each other's way."""

from collections.abc import Mapping

from launch.cluster import ClusterConfig
from launch.place import Place


def rank_environment(
    inherited: Mapping[str, str], place: Place, cluster: ClusterConfig, *, launcher: str, interface: str
) -> dict[str, str]:
    """The inherited environment with a rank's place in it. interface: what it listens on, unless the cluster file says so itself."""
    return {**inherited, **place.variables(), **interface_variables(interface), **cluster_variables(cluster, launcher=launcher)}


def interface_variables(interface: str) -> dict[str, str]:
    """What makes gloo and NCCL listen on one interface alone."""
    return {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": f"={interface}"}


def cluster_variables(cluster: ClusterConfig, *, launcher: str) -> dict[str, str]:
    """What all ranks share: bounds for every pool of compute threads, timeouts, and the cluster file's own variables."""
    return {
        "OMP_NUM_THREADS": str(cluster.threads_per_rank),
        "MKL_NUM_THREADS": str(cluster.threads_per_rank),
        "TOKENIZERS_PARALLELISM": "false",
        "HALFSTEP_LAUNCHER": launcher,
        "HALFSTEP_TIMEOUT_SECONDS": str(cluster.collective_timeout_seconds),
        **{name: str(value) for name, value in cluster.environment.items()},
    }
