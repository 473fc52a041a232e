"""The plan of a run: memory of a rank, traffic, operations, time, money and disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

from trainer.models.flops import named_peak
from trainer.plan.fake_step import Measured, kept_activations, measure
from trainer.plan.gpus import Gpu, Prices, gpu_named, usable_bytes
from trainer.plan.plan_input import PlanInput
from trainer.plan.traffic import Links, bytes_sent, collectives
from trainer.plan.work import Work, work_of

_MOMENTS = 2
_FLOAT_BYTES = 4
_MADE_OF_SHARDS = ("moments", "averages", "gradients")


@final
@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, of the one that holds most."""

    state: Mapping[str, int]
    """What stays from step to step on the device, by kind."""
    encoders: Mapping[str, int]
    """Frozen models beside the trained one."""
    drawing: Mapping[str, int]
    """Models that only draw pictures while it trains."""
    at_peak: Mapping[str, int]
    """Live tensors at the fullest moment of a step, by kind, encoders aside."""
    peak: int
    """Largest need of the device: a step, drawing samples, running the encoders or building the engine, whichever is most."""
    fullest: str
    """Which of them it is."""
    activations: int
    """What a forward pass keeps for the backward pass, without activation checkpointing."""
    activations_checkpointed: int
    """The same with it."""
    host: int
    """Main memory: the checkpoint that is being written, and what is offloaded."""


@final
@dataclass(frozen=True)
class Speed:
    """Time and money on one type of GPU; all estimates of the prices' assumptions."""

    compute_seconds: float
    traffic_seconds: float
    """Of all collectives of a step, one after the other."""
    exposed_seconds: float
    """Of those that do not go on beside the computing."""
    host_seconds: float
    """Of a step, between the device and its host's memory."""
    step_seconds: float
    run_hours: float
    usd: float


@final
@dataclass(frozen=True)
class Plan:
    """All that is known of a run before it starts."""

    source: PlanInput
    work: Work
    memory: Memory
    sent: Mapping[str, int]
    """Bytes that a rank sends in a step, by collective."""
    flops_per_image: int
    """Of a training step, without what is computed twice."""
    step_flops: int
    """Really computed in a step, by all ranks together."""
    checkpoint_bytes: int
    disk_bytes: int
    """Of a run: the checkpoints that are kept, one that is being written, and the export."""
    gpu: tuple[str, Gpu] | None
    speed: Speed | None
    """None where no type of GPU is given or it has no units for the precision."""
    usable: int | None
    """Bytes of the device that tensors may take; None where no type is given."""

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the device's memory; None where that is not known."""
        return None if self.usable is None else self.memory.peak <= self.usable


def make_plan(source: PlanInput, prices: Prices, gpu: str | None, *, work: Work | None = None, kept: tuple[int, int] | None = None) -> Plan:
    """Measure a run on tensors without memory and reckon the rest.

    gpu: a name of the prices' table. work, kept: where they are known already, `kept_activations` without and with checkpointing.

    Raises: ValueError for a type that the table does not have, or ranks that do not divide as the engine needs."""
    kind = None if gpu is None else gpu_named(prices, gpu)
    work = work or work_of(source)
    measured = measure(source)
    kept = kept or (kept_activations(source, checkpointing=False), kept_activations(source, checkpointing=True))
    memory = memory_of(source, work, measured, kept=kept)
    sent = bytes_sent(source, work.parts)
    flops_per_image = work.forward_flops + work.backward_flops + sum(frozen.flops_per_image for frozen in source.frozen)
    state_bytes = work.trained * _FLOAT_BYTES
    checkpoint_bytes = state_bytes * (1 + _MOMENTS + source.averages)
    return Plan(
        source=source,
        work=work,
        memory=memory,
        sent=sent,
        flops_per_image=flops_per_image,
        step_flops=_step_flops(source, work),
        checkpoint_bytes=checkpoint_bytes,
        disk_bytes=checkpoint_bytes * (source.keep_checkpoints + 1) + state_bytes,
        gpu=kind,
        speed=None if kind is None else speed_of(source, work, prices, kind[1]),
        usable=None if kind is None else usable_bytes(prices, kind[1]),
    )


def memory_of(source: PlanInput, work: Work, measured: Measured, *, kept: tuple[int, int]) -> Memory:
    """What was measured, and what was not: offloading, frozen encoders, and what happens between steps."""
    state, at_peak, saved = dict(measured.state), dict(measured.at_peak), 0
    offloaded: dict[str, int] = {}
    if source.engine.cpu_offload:
        moved = ("weights", "moments", "averages", "gradients", "frozen") if source.engine.kind == "fsdp" else ("moments", "averages")
        offloaded = {kind: state.get(kind, 0) for kind in moved}
        if source.engine.kind == "deepspeed":  # the fp32 partition that the optimizer moves
            offloaded["weights"] = work.trained * _FLOAT_BYTES // source.world_size
    for kind, size in offloaded.items():
        state[kind] = state.get(kind, 0) - size
        at_peak[kind] = at_peak.get(kind, 0) - size
        saved += size
    encoders = {frozen.name: _share(source, frozen.size_bytes) for frozen in source.frozen}
    drawing = {frozen.name: frozen.size_bytes for frozen in source.drawing}
    beside, draws, held = sum(encoders.values()), sum(drawing.values()), sum(state.values())
    own_weights = work.trained * _FLOAT_BYTES // (1 if source.engine.kind == "replicated" else source.world_size)
    needs = {
        "a training step": measured.peak - saved + draws,
        # Nothing has been drawn yet. The weights come whole; what is made of their shards is made where these are.
        "building the engine": measured.build_peak - sum(size for kind, size in offloaded.items() if kind in _MADE_OF_SHARDS),
        "drawing samples with the averaged weights": held + own_weights + draws,
        "the frozen encoders": held + draws + max((frozen.work_bytes for frozen in source.frozen), default=0),
    }
    fullest = max(needs, key=lambda need: needs[need])
    staged = work.trained * _FLOAT_BYTES * (1 + _MOMENTS + source.averages) // source.world_size
    return Memory(
        state={kind: size for kind, size in state.items() if size},
        encoders=encoders,
        drawing=drawing,
        at_peak={kind: size for kind, size in at_peak.items() if size},
        peak=needs[fullest] + beside,
        fullest=fullest,
        activations=kept[0],
        activations_checkpointed=kept[1],
        host=staged + sum(offloaded.values()),
    )


def _share(source: PlanInput, size_bytes: int) -> int:
    shared = size_bytes > source.engine.shard_frozen_above_gib * 2**30
    return size_bytes // source.world_size if shared else size_bytes


def speed_of(source: PlanInput, work: Work, prices: Prices, gpu: Gpu) -> Speed | None:
    """Time and money; None where the GPU has no units for the precision.

    What is sent beside the computing costs time only where it takes longer; what is sent after it always does."""
    peak = named_peak(gpu.peak, source.engine.precision)
    if peak is None:
        return None
    compute = _step_flops(source, work) / source.world_size / (peak * prices.utilisation) * source.compute_factor
    links = _links(source, prices, gpu)
    seconds = [(each.seconds(links), each.hidden) for each in collectives(source, work.parts, units=work.units)]
    traffic = sum(taken for taken, _ in seconds)
    exposed = sum(taken * (1 - hidden) for taken, hidden in seconds)
    host = _host_bytes(source, work) / (prices.host_gigabytes_per_second * 1e9)
    step = max(compute, traffic - exposed) + exposed + host
    hours = step * source.steps / 3600
    return Speed(compute, traffic, exposed, host, step, hours, hours * source.world_size * gpu.usd_per_hour)


def _links(source: PlanInput, prices: Prices, gpu: Gpu) -> Links:
    return Links(
        ranks_per_node=source.ranks_per_node,
        node_gigabytes_per_second=gpu.node_gigabytes_per_second,
        node_latency_seconds=prices.node_latency_microseconds * 1e-6,
        network_gigabytes_per_second=prices.network_gigabytes_per_second,
        network_latency_seconds=prices.network_latency_microseconds * 1e-6,
    )


def _step_flops(source: PlanInput, work: Work) -> int:
    """Computed in a step by all ranks, what is computed twice included."""
    twice = work.forward_flops if source.activation_checkpointing else 0
    beside = sum(frozen.flops_per_image for frozen in source.frozen)
    return source.global_batch_size * (work.forward_flops + work.backward_flops + twice + beside)


def _host_bytes(source: PlanInput, work: Work) -> int:
    """Between device and host in a step: shards of weights up for each pass, of gradients down."""
    if not source.engine.cpu_offload:
        return 0
    share = work.trained * _FLOAT_BYTES // source.world_size
    return share * (3 * source.accumulation if source.engine.kind == "fsdp" else 1 + source.accumulation)
