"""Machines for a run on Ray: asked for with a placement group, which is what makes a pool grow, and waited for with a limit."""

import math
import sys
import threading
import time
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group

from launch.cluster import RayCluster

_LOOK_SECONDS = 1.0
_SAY_SECONDS = 60.0
_LISTED = 8


class NoMachines(RuntimeError):
    """The cluster did not have the machines in time."""


def rank_resources(cluster: RayCluster) -> dict[str, float]:
    """What one rank is given, in Ray's terms."""
    resources: dict[str, float] = {"CPU": cluster.cpus_per_rank}
    if cluster.gpus_per_rank:
        resources["GPU"] = cluster.gpus_per_rank
    if cluster.memory_gib_per_rank is not None:
        resources["memory"] = cluster.memory_gib_per_rank * 2**30
    return {**resources, **cluster.resources_per_rank}


def find_nodes(cluster: RayCluster, *, limit_seconds: float, is_stopped: Callable[[], bool]) -> list[str] | None:
    """Ids of cluster.nodes nodes that have room for ranks_per_node ranks each; None once the run is asked to stop.

    A node that is to be taken away is not among them. The nodes are free again on return, for Ray Train to place its workers on.
    limit_seconds: math.inf waits as long as it takes.
    Raises: NoMachines saying what was asked for and what there is, if that takes longer than the limit."""
    wanted = {name: amount * cluster.ranks_per_node for name, amount in rank_resources(cluster).items()}
    deadline, said, pause = time.monotonic() + limit_seconds, time.monotonic(), threading.Event()
    while not is_stopped():
        # Ray Train's own request has one bundle a rank, which may be spread unevenly; this one has a bundle a node.
        group = placement_group([wanted] * cluster.nodes, strategy="STRICT_SPREAD")
        try:
            while not group.wait(_LOOK_SECONDS):
                if is_stopped():
                    return None
                if time.monotonic() > deadline:
                    raise NoMachines(_no_machines(cluster, wanted))
                if time.monotonic() > said + _SAY_SECONDS:
                    said = time.monotonic()
                    left = f"; gives up in {(deadline - said) / 60:.0f} minutes" if math.isfinite(deadline) else ""
                    sys.stderr.write(f"waiting for {_asked(cluster, wanted)}{left}\n")
            nodes = _nodes_of(group)
        finally:
            remove_placement_group(group)
        if not are_leaving(nodes):
            return nodes
        if time.monotonic() > deadline:
            raise NoMachines(_no_machines(cluster, wanted))
        pause.wait(_LOOK_SECONDS)
    return None


def are_leaving(nodes: list[str]) -> bool:
    """Whether any of these nodes is to be taken away, or gone: one that is drained leaves as soon as nothing runs on it."""
    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - _draining()
    return not staying.issuperset(nodes)


def _draining() -> set[str]:
    """Ids of nodes that are to be taken away: by `ray drain-node`, or by a pool whose machines are reclaimed."""
    # Private, and what Ray Train itself asks; there is no public way.
    from ray._private.state import state

    return set(state.get_draining_nodes())


def _nodes_of(group: PlacementGroup) -> list[str]:
    placed: dict[int, str] = placement_group_table(group)["bundles_to_node_id"]
    return [placed[number] for number in sorted(placed)]


def _asked(cluster: RayCluster, wanted: dict[str, float]) -> str:
    nodes = "1 node" if cluster.nodes == 1 else f"{cluster.nodes} nodes"
    return f"{nodes} with {_amounts(wanted)}{'' if cluster.nodes == 1 else ' each'} free"


def _no_machines(cluster: RayCluster, wanted: dict[str, float]) -> str:
    return (
        f"the Ray cluster had no room within {cluster.wait_for_nodes_minutes:g} minutes (cluster.wait_for_nodes_minutes): asked for "
        f"{_asked(cluster, wanted)}; it has {_described(wanted)}. Add nodes, or change cluster.nodes, cluster.ranks_per_node or "
        "what a rank takes (cluster.cpus_per_rank, gpus_per_rank, memory_gib_per_rank, resources_per_rank); the same command goes on then"
    )


def _described(wanted: dict[str, float]) -> str:
    """The cluster's nodes, with what is free on them of what is wanted."""
    from ray._private.state import available_resources_per_node

    leaving, free = _draining(), available_resources_per_node()
    living = [node for node in ray.nodes() if node["Alive"]]
    parts = []
    for node in living[:_LISTED]:
        amounts = {name: free.get(node["NodeID"], {}).get(name, 0.0) for name in wanted}
        note = ", to be taken away" if node["NodeID"] in leaving else ""
        parts.append(f"{node['NodeManagerAddress']} ({_amounts(amounts)} free{note})")
    if len(living) > _LISTED:
        parts.append(f"{len(living) - _LISTED} more")
    return ", ".join(parts) or "no nodes"


def _amounts(resources: dict[str, float]) -> str:
    """Amounts as text: 4 CPU, 16.0 GiB memory."""
    named = sorted(resources.items(), key=lambda item: item[0])
    return ", ".join(f"{amount / 2**30:.1f} GiB {name}" if name == "memory" else f"{amount:g} {name}" for name, amount in named)
