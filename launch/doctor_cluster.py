"""halfstep doctor --cluster: a cluster file against what this machine, Slurm and Ray have."""

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import final

from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster
from launch.doctor_devices import Torch, cores
from launch.doctor_machine import existing, file_system
from launch.doctor_ray import RayState
from launch.doctor_slurm import SlurmSite, seconds_of
from launch.findings import Finding, Status

_GROUP = "Cluster file"
_LISTED = 8
_OF_ONE_HOST = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "tmpfs", "ramfs", "overlay"})


@final
@dataclass(frozen=True)
class Site:
    """What there is; None for what does not answer."""

    torch: Torch | None
    slurm: SlurmSite | None
    ray: RayState | None


def check_cluster(cluster: ClusterConfig, site: Site, *, runs: Path) -> list[Finding]:
    """What of a cluster file does not fit. runs: the folder that run folders go to."""
    found = [*_kind(cluster, site)]
    if not isinstance(cluster, LocalCluster) and cluster.nodes > 1:
        found += judge_shared(runs, file_system(existing(runs), Path("/proc/self/mounts").read_text()))
    if not any(finding.status in ("warning", "problem") for finding in found):
        found.append(
            _finding("file", "ok", f"kind {cluster.kind}, {cluster.ranks} rank{'' if cluster.ranks == 1 else 's'}: fits what is here")
        )
    return found


def judge_shared(runs: Path, kind: str) -> Iterator[Finding]:
    """kind: the type of the file system that run folders would lie on."""
    if kind in _OF_ONE_HOST:
        mend = "give a --run-dir on a file system that every node mounts (NFS, Lustre, EFS, FSx)"
        yield _finding("run folders", "warning", f"{runs} is on {kind}, which other nodes do not see", mend)


def _kind(cluster: ClusterConfig, site: Site) -> Iterator[Finding]:
    match cluster:
        case LocalCluster():
            yield from _local(cluster)
        case SlurmCluster():
            yield from _slurm(cluster, site.slurm)
            yield from _paths(cluster)
        case RayCluster():
            yield from _ray(cluster, site)
            yield from _paths(cluster)


def _local(cluster: LocalCluster) -> Iterator[Finding]:
    threads, usable = cluster.ranks_per_node * cluster.threads_per_rank, cores()
    if threads > usable:
        found = f"{cluster.ranks_per_node} ranks of {cluster.threads_per_rank} threads share {usable} cores"
        yield _finding("ranks_per_node", "warning", found, f"cluster.ranks_per_node={usable} and cluster.threads_per_rank=1 are faster")


def _slurm(cluster: SlurmCluster, site: SlurmSite | None) -> Iterator[Finding]:
    if cluster.submit_with == "submitit" and find_spec("submitit") is None:
        yield _finding(
            "submit_with", "problem", "submitit is not installed", "pip install 'halfstep[slurm]', or cluster.submit_with=sbatch"
        )
    if site is None:
        yield _finding("kind", "problem", "kind slurm, but no Slurm answers here", "run this on a login node of the cluster")
        return
    name = cluster.partition or next((name for name, fields in site.partitions.items() if fields.get("Default") == "YES"), None)
    listed = ", ".join(list(site.partitions)[:_LISTED])
    if name is None:
        yield _finding("partition", "problem", "the site has no default partition", f"set cluster.partition to one of {listed}")
    # sbatch takes several, and runs the job where it can start first
    for partition in name.split(",") if name else ():
        if partition not in site.partitions:
            yield _finding("partition", "problem", f"'{partition}' does not exist", f"set cluster.partition to one of {listed}")
        else:
            yield from _partition(cluster, partition, site)


def _partition(cluster: SlurmCluster, name: str, site: SlurmSite) -> Iterator[Finding]:
    fields = site.partitions[name]
    if cluster.time_limit_minutes and cluster.time_limit_minutes * 60 > seconds_of(fields.get("MaxTime", "UNLIMITED")):
        found = f"{cluster.time_limit_minutes} minutes are more than MaxTime={fields['MaxTime']} of {name}"
        minutes = int(seconds_of(fields["MaxTime"]) // 60)
        yield _finding(
            "time_limit_minutes", "problem", found, f"cluster.time_limit_minutes={minutes}: a longer run comes back for the next segment"
        )
    nodes = min(_number(fields.get("TotalNodes")), _number(fields.get("MaxNodes")))
    if cluster.nodes > nodes:
        yield _finding(
            "nodes", "problem", f"{cluster.nodes} are asked for, a job in {name} gets {nodes:g} at most", f"cluster.nodes={nodes:g}"
        )
    if cluster.gpus_per_rank and "gres/gpu" not in fields.get("TRES", "") and "gpu" not in site.config.get("GresTypes", ""):
        mend = "cluster.gpus_per_rank=0 for ranks on CPUs, or another partition (sinfo -o '%P %G')"
        yield _finding("gpus_per_rank", "problem", f"GPUs are asked for, and Slurm knows of none in {name}", mend)


def _number(text: str | None) -> float:
    return float(text) if text and text.isdecimal() else float("inf")


def _ray(cluster: RayCluster, site: Site) -> Iterator[Finding]:
    if find_spec("ray") is None:
        yield _finding("kind", "problem", "kind ray, but Ray is not installed", "pip install 'halfstep[ray]'")
    wanted = {"CPU": cluster.cpus_per_rank, "GPU": cluster.gpus_per_rank, **cluster.resources_per_rank}
    if site.ray is None:
        gpus = len(site.torch.gpus) if site.torch else 0
        if cluster.address or os.environ.get("RAY_ADDRESS"):
            yield _finding("address", "problem", "no Ray answers there (see Ray)", "start it, or set cluster.address to one that runs")
        elif cluster.gpus_per_rank and gpus < cluster.ranks:
            yield _finding(
                "gpus_per_rank", "problem", f"{cluster.ranks} GPUs are asked for, this machine has {gpus}", "cluster.gpus_per_rank=0"
            )
        return
    if cluster.nodes > site.ray.nodes:
        found = f"{cluster.nodes} are asked for, the cluster has {site.ray.nodes} now"
        yield _finding("nodes", "warning", found, "a pool that scales by itself adds them; else the run waits wait_for_nodes_minutes")
    for name, amount in wanted.items():
        total, has = amount * cluster.ranks, site.ray.resources.get(name, 0.0)
        if total > has:
            yield _finding(
                f"{name} of all ranks", "warning", f"{total:g} are asked for, the cluster has {has:g} now", "the run waits for more"
            )


def _paths(cluster: SlurmCluster | RayCluster) -> Iterator[Finding]:
    """What must exist on the nodes, looked for here."""
    here = " here; the nodes may differ"
    if cluster.python is not None and shutil.which(cluster.python) is None:
        found = f"{cluster.python} is no program{here}"
        yield _finding("python", "warning", found, f"cluster.python={sys.executable}, or a path that the nodes have")
    if cluster.network_interface is not None:
        names = [name for _, name in socket.if_nameindex()]
        if cluster.network_interface not in names:
            found = f"no '{cluster.network_interface}'{here}: this host has {', '.join(names)}"
            yield _finding("network_interface", "warning", found, "ip -brief address, on a node, lists its interfaces")
    if isinstance(cluster, SlurmCluster) and cluster.container and shutil.which(shlex.split(cluster.container)[0]) is None:
        yield _finding(
            "container", "warning", f"no program {shlex.split(cluster.container)[0]}{here}", "a line of cluster.setup may load it"
        )


def _finding(name: str, status: Status, found: str, mend: str = "") -> Finding:
    return Finding(_GROUP, name, status, found, mend)
