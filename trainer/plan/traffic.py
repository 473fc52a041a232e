"""What ranks send in an optimizer step, by engine, and how long that takes; rings, as NCCL and gloo make them for large messages."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from trainer.engines.zero_partitions import bucket_elements
from trainer.plan.plan_input import BYTES, PlanInput

_KEPT_WHOLE, _REUSE_DISTANCE, _PREFETCHED = 100_000, 1_000_000_000, 50_000_000
"""Elements, DeepSpeed 0.19's defaults for ZeRO-3: of parameters that stay whole on every rank, of what may lie between two uses of
gathered weights that are kept meanwhile, of what is gathered ahead at a time."""


@final
@dataclass(frozen=True)
class Part:
    """Weights that are gathered or reduced together: shape and bytes an element of each, trained or frozen."""

    shape: tuple[int, ...]
    element_bytes: int
    trained: bool

    @property
    def count(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)


@final
@dataclass(frozen=True)
class Links:
    """What connects ranks: 1e9 bytes that each sends in a second, and seconds from one to the next; in a node, and between nodes."""

    ranks_per_node: int
    node_gigabytes_per_second: float
    node_latency_seconds: float
    network_gigabytes_per_second: float
    network_latency_seconds: float


@final
@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in an optimizer step."""

    name: str
    whole_bytes: int
    """Of the tensors that they gather or reduce, together."""
    ranks: int
    """Of a group."""
    passes: int = 1
    """Times that a ring carries each byte: 2 for an all-reduce."""
    count: float = 1
    """How many there are."""
    hidden: float = 0.0
    """Share that goes on beside the computing."""
    stride: int = 1
    """From a rank to the next one of its group."""

    @property
    def sent_bytes(self) -> int:
        """By each rank in a step.

        Source: Patarasuk & Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations", section 3."""
        return self.passes * self.whole_bytes * (self.ranks - 1) // self.ranks

    def seconds(self, links: Links) -> float:
        """Of all of them in a step, one after the other.

        A ring goes through all of a node's ranks before it leaves the node, and there are as many rings as the node has links to the
        network, each with its share of the bytes: so a group is as fast between nodes as the links of its ranks in one node together.
        Starting takes a latency for each hop of a ring, or of a tree where that has fewer and there is one (for all-reduces).
        Source: NCCL 2.2x, src/graph/tuning.cc, ncclTopoTuneModel."""
        if self.ranks == 1:
            return 0.0
        in_node = min(self.ranks, max(1, links.ranks_per_node // self.stride))
        nodes = -(-self.ranks // in_node)
        rate = links.node_gigabytes_per_second
        if nodes > 1:
            rate = min(rate, links.network_gigabytes_per_second * in_node)
        outside, inside = nodes - 1, self.ranks - nodes
        latency = self.passes * (inside * links.node_latency_seconds + outside * links.network_latency_seconds)
        if self.passes == 2:
            tree = 2 * ((in_node - 1) * links.node_latency_seconds + math.ceil(math.log2(nodes)) * links.network_latency_seconds)
            latency = min(latency, tree)
        return self.sent_bytes / (rate * 1e9) + self.count * latency


def bytes_sent(plan: PlanInput, parts: Sequence[Part]) -> Mapping[str, int]:
    """By collective, of one rank in one optimizer step."""
    return {collective.name: collective.sent_bytes for collective in collectives(plan, parts) if collective.sent_bytes}


def collectives(plan: PlanInput, parts: Sequence[Part], *, units: int = 1) -> tuple[Collective, ...]:
    """Of an optimizer step. units: parts of the network that a sharded engine gathers at a time.

    Numbers beside the weights and gradients (losses, votes, norms) are left out. benchmarks/traffic.py counts the bytes on sockets."""
    match plan.engine.kind:
        case "replicated":
            return (Collective("all-reduce of gradients", 4 * _trained(parts), plan.world_size, passes=2),)
        case "fsdp":
            return tuple(_fsdp(plan, parts, units))
        case "deepspeed":
            return tuple(_zero_3(plan, parts) if plan.engine.zero_stage == 3 else _zero_1_2(plan, parts))


def _fsdp(plan: PlanInput, parts: Sequence[Part], units: int) -> Iterator[Collective]:
    """FSDP2 deals rows to ranks: where there are fewer rows than ranks it fills up, and the filling travels too."""
    replicas, repeats = plan.engine.replicas, plan.accumulation
    shards = plan.world_size // replicas
    lower = None if plan.engine.precision == "fp32" else BYTES[plan.engine.precision]
    gathered = sum(_filled(part, shards) * (lower or part.element_bytes) for part in parts)
    reduced = sum(_filled(part, shards) * 4 for part in parts if part.trained)
    count = repeats * units
    yield Collective("all-gather of weights", 2 * repeats * gathered, shards, count=2 * count, hidden=1)
    yield Collective("reduce-scatter of gradients", repeats * reduced, shards, passes=_scatter_passes(plan), count=count, hidden=1)
    yield Collective("all-reduce among replicas", repeats * reduced // shards, replicas, passes=2, count=count, hidden=1, stride=shards)


def _zero_1_2(plan: PlanInput, parts: Sequence[Part]) -> Iterator[Collective]:
    """DeepSpeed reduces buckets of many ranks' shares by one all-reduce (`use_multi_rank_bucket_allreduce`) and keeps its own share."""
    trained = _trained(parts)
    repeats = 1 if plan.engine.zero_stage == 1 else plan.accumulation
    buckets, hidden = _buckets(trained)
    yield Collective("all-reduce of gradients", 4 * repeats * trained, plan.world_size, passes=2, count=repeats * buckets, hidden=hidden)
    yield Collective("all-gather of weights", 4 * trained, plan.world_size)


def _zero_3(plan: PlanInput, parts: Sequence[Part]) -> Iterator[Collective]:
    """Weights are gathered for the forward pass and stay for the backward pass; where many elements are used in between, DeepSpeed may
    give them back and gather them again, which is counted. Small parameters stay for the whole step and are gathered after it."""
    ranks, repeats, trained = plan.world_size, plan.accumulation, _trained(parts)
    large = [part for part in parts if part.count > _KEPT_WHOLE]
    small = sum(part.count * part.element_bytes for part in parts if part.count <= _KEPT_WHOLE and part.trained)
    gathered, after = 0, sum(part.count for part in large)
    for part in large:
        after -= part.count
        gathered += part.count * part.element_bytes * (2 if 2 * after > _REUSE_DISTANCE else 1)
    count = repeats * -(-sum(part.count for part in large) // _PREFETCHED) + 1
    buckets, hidden = _buckets(trained)
    yield Collective("all-gather of weights", repeats * gathered + small, ranks, count=count, hidden=1)
    yield Collective(
        "reduce-scatter of gradients", 4 * repeats * trained, ranks, passes=_scatter_passes(plan), count=repeats * buckets, hidden=hidden
    )


def _scatter_passes(plan: PlanInput) -> int:
    """gloo's reduce-scatter, which CPUs use, is an all-reduce of which each rank keeps its share."""
    return 1 if plan.on_gpu else 2


def _buckets(trained: int) -> tuple[int, float]:
    """How many buckets of gradients DeepSpeed reduces, and which share beside the backward pass: all but the last one."""
    size = bucket_elements(trained)
    buckets = max(1, -(-trained // size))
    return buckets, (buckets - 1) * size / max(trained, 1)


def _trained(parts: Sequence[Part]) -> int:
    return sum(part.count for part in parts if part.trained)


def _filled(part: Part, shards: int) -> int:
    """Elements of a part whose rows are dealt to `shards` ranks, each filled up to as many as the first one has."""
    rows = part.shape[0] if part.shape else 1
    return -(-rows // shards) * shards * (part.count // max(rows, 1))
