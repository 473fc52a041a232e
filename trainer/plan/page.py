"""A plan as a page for people who decide whether to submit a job, and as JSON for programs."""

from collections.abc import Iterator, Mapping, Sequence

from trainer.plan.gpus import PRICES_FILE, Prices
from trainer.plan.plan import Plan, Speed
from trainer.plan.ways_out import WayOut

_KINDS = {
    "weights": "weights, fp32",
    "frozen": "frozen weights of the network",
    "gradients": "gradients, fp32",
    "moments": "Adam's two moments",
    "averages": "averaged weights (EMA)",
    "gathered": "weights gathered from other ranks",
    "cast": "weights in the lower precision",
    "sent": "buffers of collectives",
    "activations": "activations kept for backward",
    "other": "other working memory",
}
_WIDTH = 44
_STARTING_SECONDS = 0.02
"""Of a step with thousands of kernels, below which starting them takes most of the time."""


def page(plan: Plan, prices: Prices, ways: Sequence[WayOut], *, title: str) -> str:
    """The whole page, ending with the verdict."""
    blocks = [
        [title],
        list(_parameters(plan)),
        list(_memory(plan)),
        list(_step(plan)),
        list(_time(plan, prices)),
        list(_disk(plan)),
        list(_verdict(plan, ways)),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block) + "\n"


def _parameters(plan: Plan) -> Iterator[str]:
    work = plan.work
    yield _row("Parameters", f"{_count(work.trained)} trained" + (f", {_count(work.frozen)} frozen" if work.frozen else ""))
    if len(work.components) > 1 or plan.source.frozen or plan.source.drawing:
        for name, (trained, frozen) in work.components.items():
            parts = [text for number, text in ((trained, "trained"), (frozen, "frozen")) if number]
            yield _row(f"  {name}", ", ".join(f"{_count(trained if word == 'trained' else frozen)} {word}" for word in parts))
        for encoder in plan.source.frozen:
            yield _row(f"  {encoder.name}", f"{_count(encoder.parameters)} frozen beside it, {encoder.precision}")
        for model in plan.source.drawing:
            yield _row(f"  {model.name}", f"{_count(model.parameters)} to draw pictures, {model.precision}")


def _memory(plan: Plan) -> Iterator[str]:
    memory, source = plan.memory, plan.source
    device = "GPU" if source.on_gpu else "CPU"
    yield _row(f"Memory of a rank's {device} at its fullest", _size(memory.peak))
    for kind, label in _KINDS.items():
        if size := memory.at_peak.get(kind):
            yield _row(f"  {label}", _size(size))
    for name, size in memory.encoders.items():
        yield _row(f"  {name}, frozen", _size(size))
    for name, size in memory.drawing.items():
        yield _row(f"  {name}, to draw pictures", _size(size))
    if memory.fullest != "a training step":
        yield f"  The rows are of a training step; more is needed for {memory.fullest}."
    now, other = memory.activations, memory.activations_checkpointed
    yield _row("Activations of a micro-batch", f"{_size(now)}, with activation checkpointing {_size(other)}")
    yield _row("Main memory of a rank, for checkpoints" + (" and offload" if source.engine.cpu_offload else ""), _size(memory.host))


def _step(plan: Plan) -> Iterator[str]:
    source = plan.source
    accumulated = f" in {source.accumulation} micro-batches of {source.micro_batch_size}" if source.accumulation > 1 else ""
    ranks = "1 rank" if source.world_size == 1 else f"{source.world_size} ranks"
    yield _row("Images of a step", f"{source.global_batch_size}: {ranks} x {source.accumulation * source.micro_batch_size}{accumulated}")
    yield _row("Operations of an image", _flops(plan.flops_per_image))
    again = " (activations computed twice included)" if source.activation_checkpointing else ""
    yield _row("Operations of a step", _flops(plan.step_flops) + again)
    yield _row("A rank sends in a step", _size(sum(plan.sent.values())) if plan.sent else "nothing")
    for name, size in plan.sent.items():
        yield _row(f"  {name}", _size(size))


def _time(plan: Plan, prices: Prices) -> Iterator[str]:
    if plan.gpu is None:
        yield "Time, cost and whether it fits: name the GPU, such as --gpu h100."
        yield f"  {PRICES_FILE} has {', '.join(prices.gpus)}."
        return
    name, gpu = plan.gpu
    precision, speed, source = plan.source.engine.precision, plan.speed, plan.source
    if speed is None:
        yield f"Time: a {name} has no units for {precision}, so none is estimated; set engine.precision=fp16 or fp32."
        return
    yield _row(f"Time of a step on {source.world_size} x {name}", f"about {_seconds(speed.step_seconds)}")
    traffic = f"{_seconds(speed.traffic_seconds)} sending{_beside(speed)}"
    to_host = f", {_seconds(speed.host_seconds)} to and from main memory" if speed.host_seconds else ""
    yield _row("  of which", f"{_seconds(speed.compute_seconds)} computing, {traffic}{to_host}")
    if speed.step_seconds < _STARTING_SECONDS:
        yield "  So short a step is spent on starting kernels: it will take longer than this."
    yield _row(f"Time of the run, {source.steps} steps", f"about {_hours(speed.run_hours)}")
    yield _row("Cost of the run", f"{_rounded(speed.usd)} USD at {gpu.usd_per_hour:g} USD an hour and GPU")
    rate = (
        f"{gpu.node_gigabytes_per_second:g} GB/s within the node"
        if source.world_size <= source.ranks_per_node
        else f"{prices.network_gigabytes_per_second:g} GB/s a rank between nodes"
    )
    yield f"  Assumed: {prices.utilisation:.0%} of the data sheet's {precision} peak, {rate}, data always in time."
    yield f"  Prices are placeholders until you put yours into {PRICES_FILE} (of {prices.date})."


def _beside(speed: Speed) -> str:
    """How much of the sending the computing does not hide."""
    if speed.exposed_seconds == 0:
        return ", beside it"
    return ", after it" if speed.exposed_seconds == speed.traffic_seconds else f", {_seconds(speed.exposed_seconds)} of it after it"


def _disk(plan: Plan) -> Iterator[str]:
    kept = plan.source.keep_checkpoints
    yield _row("A checkpoint", _size(plan.checkpoint_bytes))
    yield _row(
        "Disk of the run", f"{_size(plan.disk_bytes)}: {kept} checkpoint{'' if kept == 1 else 's'} kept, one being written, the export"
    )


def _verdict(plan: Plan, ways: Sequence[WayOut]) -> Iterator[str]:
    if plan.gpu is None or plan.usable is None:
        return
    name, gpu = plan.gpu
    peak, usable = plan.memory.peak, plan.usable
    of = f"of the {_size(usable)} that tensors get of {'an' if name[0] in 'aeiou' else 'a'} {name}'s {gpu.memory_gib:g} GiB"
    if plan.fits:
        yield f"FITS: {_size(peak)} {of}; {max(1, round(100 * peak / usable))}% is used."
        return
    yield f"DOES NOT FIT: {_size(peak)} {of}; {_size(peak - usable)} too much."
    if not ways:
        yield "  No change that plan knows makes it fit; take more ranks, a larger GPU, smaller images or a smaller model."
        return
    yield "What makes it fit, fastest first:"
    for way in ways:
        speed = f", {_seconds(way.plan.speed.step_seconds)} a step" if way.plan.speed else ""
        yield f"  {way.change}"
        yield f"      {_size(way.plan.memory.peak)}{speed}"


def as_json(plan: Plan, prices: Prices, ways: Sequence[WayOut]) -> dict[str, object]:
    """All figures of the page: bytes, operations, seconds, hours, US dollars; null where a type of GPU would be needed."""
    return {
        **_figures(plan),
        "components": {name: {"trained": trained, "frozen": frozen} for name, (trained, frozen) in plan.work.components.items()},
        "assumptions": {
            "utilisation": prices.utilisation,
            "network_bytes_per_second": prices.network_gigabytes_per_second * 1e9,
            "node_bytes_per_second": plan.gpu[1].node_gigabytes_per_second * 1e9 if plan.gpu else None,
            "usd_per_gpu_hour": plan.gpu[1].usd_per_hour if plan.gpu else None,
            "prices_date": prices.date,
        },
        "ways_out": [{"change": way.change, **_figures(way.plan)} for way in ways],
    }


def _figures(plan: Plan) -> dict[str, object]:
    memory, speed, source = plan.memory, plan.speed, plan.source
    return {
        "world_size": source.world_size,
        "global_batch_size": source.global_batch_size,
        "engine": source.engine.model_dump(mode="json"),
        "activation_checkpointing": source.activation_checkpointing,
        "parameters": {"trained": plan.work.trained, "frozen": plan.work.frozen},
        "rank_bytes": {
            "peak": memory.peak,
            "fullest": memory.fullest,
            "state": dict(memory.state),
            "at_peak": dict(memory.at_peak),
            "encoders": dict(memory.encoders),
            "drawing": dict(memory.drawing),
            "activations": memory.activations,
            "activations_with_checkpointing": memory.activations_checkpointed,
            "host": memory.host,
        },
        "sent_bytes_per_step": dict(plan.sent),
        "flops_per_image": plan.flops_per_image,
        "flops_per_step": plan.step_flops,
        "checkpoint_bytes": plan.checkpoint_bytes,
        "disk_bytes": plan.disk_bytes,
        "gpu": plan.gpu[0] if plan.gpu else None,
        "usable_bytes": plan.usable,
        "fits": plan.fits,
        "step_seconds": speed.step_seconds if speed else None,
        "run_hours": speed.run_hours if speed else None,
        "usd": speed.usd if speed else None,
    }


def _row(label: str, value: str) -> str:
    return f"{label:{_WIDTH}} {value}"


def _scaled(number: float, units: Mapping[str, float]) -> str:
    """Three figures: nothing here is known better."""
    unit, size = next(((unit, size) for unit, size in units.items() if number >= size), list(units.items())[-1])
    value = number / size
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f}{unit}"


def _size(size_bytes: int) -> str:
    return _scaled(size_bytes, {" TiB": 2.0**40, " GiB": 2.0**30, " MiB": 2.0**20, " KiB": 2.0**10})


def _count(number: int) -> str:
    return str(number) if number < 1000 else _scaled(number, {"B": 1e9, "M": 1e6, "K": 1e3})


def _flops(number: int) -> str:
    return _scaled(number, {" EFLOP": 1e18, " PFLOP": 1e15, " TFLOP": 1e12, " GFLOP": 1e9, " MFLOP": 1e6})


def _seconds(seconds: float) -> str:
    return _scaled(seconds, {" s": 1.0, " ms": 1e-3, " us": 1e-6})


def _hours(hours: float) -> str:
    if hours >= 48:
        return _scaled(hours, {" days": 24.0})
    return _scaled(hours * 60, {" hours": 60.0, " minutes": 1.0}) if hours * 60 >= 1 else _seconds(hours * 3600)


def _rounded(usd: float) -> str:
    """Two figures of a price."""
    if usd < 0.01:
        return "less than 0.01"
    return f"about {usd:.2g}" if usd < 100 else f"about {float(f'{usd:.2g}'):,.0f}"
