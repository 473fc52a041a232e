"""Memory of a rank, bytes it sends in a step, and predicted efficiency from 1 to 1,024 GPUs, on named networks: docs/scale.md's figures.

    .venv/bin/python benchmarks/scale.py          about 4 minutes on 2 cores; memory that was measured is kept

Nothing here is run on a GPU: it is what `halfstep plan` says. Memory is that of rank 0 of a fake process group which takes a step of the
real engine on tensors without memory (ZeRO: of the buffers that DeepSpeed keeps); traffic, time and efficiency follow from the engine's
collectives and the links in NETWORKS and configs/prices.yaml. Written: benchmarks/results/scale.json, three plots beside it, and the
tables in docs/scale.md."""

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from measure import put_table
from PIL import Image
from plot import Line, below, beside, line_plot

from trainer.config_io import load_recipe, recipe_path
from trainer.plan.fake_step import measure
from trainer.plan.from_recipe import plan_input
from trainer.plan.gpus import Prices, gpu_named, load_prices, usable_bytes
from trainer.plan.plan import Speed, memory_of, speed_of
from trainer.plan.plan_input import PlanInput
from trainer.plan.traffic import bytes_sent
from trainer.plan.work import Work, work_of

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs" / "scale.md"
GPU, NODE = "h100", 8
RANKS = tuple(2**power for power in range(11))
MEASURED = (1, 8, 64, 1024)
"""Ranks whose memory is measured."""


@final
@dataclass(frozen=True)
class Network:
    """Between nodes of 8 GPUs."""

    name: str
    gigabytes_per_second: float
    """1e9 bytes a second for each GPU: of the node's links, by 8."""
    latency_microseconds: float
    source: str


NETWORKS = (
    Network(
        "InfiniBand NDR",
        50.0,
        14,
        "400 Gbit/s for each GPU (NVIDIA DGX H100 data sheet); 14 us a hop as NCCL reckons (src/graph/tuning.cc, hwLat)",
    ),
    Network(
        "EFA of p5",
        50.0,
        89,
        "3,200 Gbit/s a node (AWS, p5.48xlarge); NCCL's 14 us and 75 more, as aws-ofi-nccl tells NCCL for p5 (src/platform-aws.cpp)",
    ),
    Network("100 GbE", 100 / 8 / NODE, 50, "one port of 100 Gbit/s for the whole node; 50 us a hop over TCP is an assumption"),
)
MODELS: Mapping[str, tuple[str, ...]] = {
    "SD 2.1, full": ("sd21_lora_cartoon", "adaptation={kind: full}", "data.micro_batch_size=8"),
    "SD 2.1, LoRA": ("sd21_lora_cartoon", "data.micro_batch_size=8"),
    "DDPM 113.67M": ("ddpm_celebahq_cartoon", "data.micro_batch_size=16"),
}
"""By name: a recipe and what is changed of it."""
WAYS: Mapping[str, Mapping[str, object]] = {
    "DDP": {"kind": "replicated"},
    "FSDP2": {"kind": "fsdp"},
    "HSDP": {"kind": "fsdp"},
    "ZeRO-1": {"kind": "deepspeed", "zero_stage": 1},
    "ZeRO-2": {"kind": "deepspeed", "zero_stage": 2},
    "ZeRO-3": {"kind": "deepspeed", "zero_stage": 3},
}
"""By name: an engine; HSDP keeps a copy of the model in each node."""


def main() -> None:
    """Measure what is missing, then write the plots and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="only these are measured")
    parser.add_argument("--quick", action="store_true", help="one model, nothing written but to standard output")
    options = parser.parse_args()
    names = [*MODELS][-1:] if options.quick else options.models
    path = RESULTS / "scale.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not options.quick else {}
    prices = load_prices()
    plans = {name: alone(name) for name in names}
    works = {name: work_of(plan) for name, plan in plans.items()}
    for name, plan in plans.items():
        kept[name] = {"memory_bytes": {}, **kept.get(name, {}), **figures(plan, works[name], prices)}
    for name, way, ranks in itertools.product(names, WAYS, MEASURED):
        found, key = kept[name]["memory_bytes"], measured_key(way, ranks)
        if key in found or (options.quick and ranks > 1):
            continue
        plan = on(plans[name], way, ranks)
        found[key] = memory_of(plan, works[name], measure(plan), kept=(0, 0)).peak
        sys.stderr.write(f"{name}, {key}: {found[key] / 2**30:.2f} GiB\n")
        if not options.quick:
            path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    tables = [line for name in names for line in table(name, kept[name], prices)]
    sys.stdout.write("\n".join(tables) + "\n")
    if options.quick or set(kept) != set(MODELS):
        return
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for name in MODELS:
        plots(name, kept[name]).save(RESULTS / f"scale_{file_name(name)}.png", optimize=True)
    put_table(
        DOCS, "networks", (f"- **{network.name}**: {network.gigabytes_per_second:g} GB/s a GPU: {network.source}." for network in NETWORKS)
    )
    put_table(DOCS, "scale", tables)


def alone(name: str) -> PlanInput:
    """A model on one GPU, which computes one micro-batch a step; its network alone, as if latents and text states came from the shards."""
    recipe, *words = MODELS[name]
    micro_batch_size = words[-1].partition("=")[2]
    words += [f"data.global_batch_size={micro_batch_size}", "engine.precision=bf16", "train.activation_checkpointing=false"]
    plan = plan_input(load_recipe(recipe_path(recipe), words), world_size=1, ranks_per_node=NODE, on_gpu=True)
    return replace(plan, frozen=(), drawing=())


def on(plan: PlanInput, way: str, ranks: int) -> PlanInput:
    """The same in one way on so many GPUs, each of which computes as much as before (weak scaling)."""
    replicas = max(1, ranks // NODE) if way == "HSDP" else 1
    engine = plan.engine.model_copy(update={**WAYS[way], "replicas": replicas})
    return replace(plan, world_size=ranks, micro_batches=ranks, engine=engine)


def measured_key(way: str, ranks: int) -> str:
    """Equal for what needs equal memory: on one GPU all are DDP, which needs the same on any number; HSDP on a node is FSDP2."""
    if ranks == 1 or way == "DDP":
        return "DDP"
    return f"{'FSDP2' if way == 'HSDP' and ranks <= NODE else way} {ranks}"


def figures(plan: PlanInput, work: Work, prices: Prices) -> dict[str, object]:
    """Bytes that a rank sends, and efficiency on each network: the computing's share of a step."""
    ways = {way: [on(plan, way, ranks) for ranks in RANKS] for way in WAYS}
    alone = _speed(plan, work, prices)
    return {
        "trained": work.trained,
        "frozen": work.frozen,
        "images_a_gpu": plan.micro_batch_size,
        "compute_seconds": alone.compute_seconds,
        "sent_bytes": {way: [sum(bytes_sent(each, work.parts).values()) for each in plans] for way, plans in ways.items()},
        "efficiency": {
            network.name: {way: [_efficiency(each, work, prices, network) for each in plans] for way, plans in ways.items()}
            for network in NETWORKS
        },
    }


def _efficiency(plan: PlanInput, work: Work, prices: Prices, network: Network) -> float:
    links = {"network_gigabytes_per_second": network.gigabytes_per_second, "network_latency_microseconds": network.latency_microseconds}
    speed = _speed(plan, work, prices.model_copy(update=links))
    return round(speed.compute_seconds / speed.step_seconds, 4)


def _speed(plan: PlanInput, work: Work, prices: Prices) -> Speed:
    speed = speed_of(plan, work, prices, gpu_named(prices, GPU)[1])
    assert speed is not None, "an H100 computes in bf16"
    return speed


def table(name: str, found: Mapping, prices: Prices) -> Iterator[str]:
    """Memory and traffic by way, then efficiency by way and network."""
    _, gpu = gpu_named(prices, GPU)
    trained = f"{found['trained'] / 1e6:.2f}M weights trained" + (
        f" beside {found['frozen'] / 1e6:.1f}M frozen ones" if found["frozen"] else ""
    )
    yield f"### {name}\n"
    yield f"{trained}, {found['images_a_gpu']} images a GPU and step, {found['compute_seconds'] * 1e3:.0f} ms of computing.\n"
    yield f"![{name}](../benchmarks/results/scale_{file_name(name)}.png)\n"
    few = [ranks for ranks in MEASURED if ranks > 1]
    yield f"| way | {' | '.join(f'memory on {ranks}' for ranks in few)} | {' | '.join(f'sent on {ranks}' for ranks in few)} |"
    yield "| --- |" + " --- |" * 2 * len(few)
    for way in WAYS:
        peaks = [found["memory_bytes"].get(measured_key(way, ranks)) for ranks in few]
        cells = [f"{peak / 2**30:.1f} GiB" if peak else "" for peak in peaks]
        cells += [f"{found['sent_bytes'][way][RANKS.index(ranks)] / 1e9:.2f} GB" for ranks in few]
        yield f"| {way} | {' | '.join(cells)} |"
    one = found["memory_bytes"].get("DDP")
    if one:
        yield f"\nOne GPU alone: {one / 2**30:.1f} GiB of the {usable_bytes(prices, gpu) / 2**30:.0f} GiB that tensors get of an H100.\n"
    yield f"| efficiency | 8, NVLink | {' | '.join(f'{ranks}, {network.name}' for network in NETWORKS for ranks in few[1:])} |"
    yield "| --- | --- |" + " --- |" * (len(few) - 1) * len(NETWORKS)
    for way in WAYS:
        by_network = found["efficiency"]
        cells = [by_network[NETWORKS[0].name][way][RANKS.index(NODE)]]
        cells += [by_network[network.name][way][RANKS.index(ranks)] for network in NETWORKS for ranks in few[1:]]
        yield f"| {way} | {' | '.join(f'{100 * cell:.0f}%' for cell in cells)} |"
    yield ""


def plots(name: str, found: Mapping) -> Image.Image:
    """Memory, traffic, and efficiency on the fastest and the slowest network over the number of GPUs."""

    def peaks(way: str) -> list[list[float]]:
        keys = [measured_key(way, ranks) for ranks in MEASURED]
        return [[found["memory_bytes"][key] / 2**30] if key in found["memory_bytes"] else [] for key in keys]

    def over_ranks(title: str, ranks: Sequence[int], values: Mapping[str, Sequence[float]], unit: float, label: str) -> Image.Image:
        lines = [Line(way, [[value / unit] for value in values[way]], colour) for colour, way in enumerate(WAYS)]
        return line_plot(f"{name}: {title}", [str(number) for number in ranks], lines, x_label="GPUs, 8 a node", y_label=label)

    memory = [Line(way, peaks(way), colour) for colour, way in enumerate(WAYS)]
    sent = {way: values[1:] for way, values in found["sent_bytes"].items()}
    fast, *_, slow = NETWORKS
    return below(
        [
            beside(
                [
                    line_plot(
                        f"{name}: memory of a GPU", [str(ranks) for ranks in MEASURED], memory, x_label="GPUs, 8 a node", y_label="GiB"
                    ),
                    over_ranks("sent by a GPU in a step", RANKS[1:], sent, 1e9, "GB"),
                ]
            ),
            beside([over_ranks(f"efficiency, {at.name}", RANKS, found["efficiency"][at.name], 0.01, "% of a step") for at in (fast, slow)]),
        ]
    )


def file_name(name: str) -> str:
    """Of its plots."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower().replace(", ", "_"))


if __name__ == "__main__":
    main()
