"""Memory of a rank, bytes it sends in a step, and predicted efficiency from 1 to 1,024 GPUs, on named networks: docs/scale.md's figures.

    .venv/bin/python benchmarks/scale.py          about 15 minutes of one core; what was measured is kept and not measured again

Nothing here is run on a GPU: it is what `halfstep plan` says. Memory is that of rank 0 of a fake process group which takes a step of the
real engine on tensors without memory (ZeRO: of the buffers that DeepSpeed keeps); traffic, time and efficiency follow from the engine's
collectives and the links in NETWORKS and configs/prices.yaml. Written: benchmarks/results/scale.json, three plots beside it, and the
tables in docs/scale.md."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from plot import Line, beside, line_plot

from trainer.config_io import load_recipe, recipe_path
from trainer.plan.fake_step import measure
from trainer.plan.from_recipe import plan_input
from trainer.plan.gpus import Prices, gpu_named, load_prices, usable_bytes
from trainer.plan.plan import memory_of, speed_of
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
    "SD 2.1, full": (
        "sd21_lora_cartoon",
        "adaptation={kind: full}",
        "model.latents=stored",
        "model.text=stored",
        "data.micro_batch_size=8",
    ),
    "SD 2.1, LoRA": ("sd21_lora_cartoon", "model.latents=stored", "model.text=stored", "data.micro_batch_size=8"),
    "DDPM 113.67M": ("ddpm_celebahq_cartoon", "data.micro_batch_size=16"),
}
"""By name: a recipe and what is changed of it."""
WAYS: Mapping[str, tuple[str, ...]] = {
    "DDP": ("engine.kind=replicated",),
    "FSDP2": ("engine.kind=fsdp",),
    "HSDP": ("engine.kind=fsdp",),
    "ZeRO-1": ("engine.kind=deepspeed", "engine.zero_stage=1"),
    "ZeRO-2": ("engine.kind=deepspeed", "engine.zero_stage=2"),
    "ZeRO-3": ("engine.kind=deepspeed", "engine.zero_stage=3"),
}


def main() -> None:
    """Measure what is missing, then write the plots and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="only these are measured")
    parser.add_argument("--quick", action="store_true", help="one model, nothing written but to standard output")
    options = parser.parse_args()
    names = ["DDPM 113.67M"] if options.quick else options.models
    path = RESULTS / "scale.json"
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() and not options.quick else {}
    prices = load_prices()
    for name in names:
        found = kept.setdefault(name, {"memory_bytes": {}})
        work = work_of(plan_of(name, "DDP", 1))
        found |= figures(name, work, prices)
        for way in WAYS:
            for ranks in MEASURED:
                key = measured_key(way, ranks)
                if key not in found["memory_bytes"] and (ranks == 1 or not options.quick):
                    plan = plan_of(name, way, ranks)
                    found["memory_bytes"][key] = memory_of(plan, work, measure(plan), kept=(0, 0)).peak
                    sys.stderr.write(f"{name}, {key}: {found['memory_bytes'][key] / 2**30:.2f} GiB\n")
                    if not options.quick:
                        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    tables = "\n".join(line for name in names for line in table(name, kept[name], prices))
    sys.stdout.write(tables + "\n")
    if options.quick or set(kept) != set(MODELS):
        return
    path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
    for name in MODELS:
        plots(name, kept[name]).save(RESULTS / f"scale_{file_name(name)}.png", optimize=True)
    begin, end = "<!-- scale: begin -->", "<!-- scale: end -->"
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(begin)
    DOCS.write_text(f"{before}{begin}\n{tables}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def plan_of(name: str, way: str, ranks: int) -> PlanInput:
    """A model trained in one way on so many GPUs, each of which computes one micro-batch a step (weak scaling)."""
    recipe, *words = MODELS[name]
    micro = int(words[-1].partition("=")[2])
    words += [f"data.global_batch_size={micro * ranks}", "engine.precision=bf16", "train.activation_checkpointing=false", *WAYS[way]]
    if way == "HSDP":
        words.append(f"engine.replicas={max(1, ranks // NODE)}")
    config = load_recipe(recipe_path(recipe), words)
    return plan_input(config, world_size=ranks, ranks_per_node=NODE, on_gpu=True)


def measured_key(way: str, ranks: int) -> str:
    """Equal for what needs equal memory: on one GPU all are DDP, which needs the same on any number; HSDP on a node is FSDP2."""
    if ranks == 1 or way == "DDP":
        return "DDP"
    return f"{'FSDP2' if way == 'HSDP' and ranks <= NODE else way} {ranks}"


def figures(name: str, work: Work, prices: Prices) -> dict[str, object]:
    """Bytes that a rank sends, and efficiency on each network: the computing's share of a step."""
    _, gpu = gpu_named(prices, GPU)
    sent: dict[str, list[int]] = {}
    efficiency: dict[str, dict[str, list[float]]] = {network.name: {} for network in NETWORKS}
    first = {way: plan_of(name, way, 1) for way in WAYS}
    for way, plan in first.items():
        ways = [_on(plan, way, ranks) for ranks in RANKS]
        sent[way] = [sum(bytes_sent(each, work.parts).values()) for each in ways]
        for network in NETWORKS:
            links = prices.model_copy(
                update={
                    "network_gigabytes_per_second": network.gigabytes_per_second,
                    "network_latency_microseconds": network.latency_microseconds,
                }
            )
            speeds = [speed_of(each, work, links, gpu) for each in ways]
            efficiency[network.name][way] = [round(speed.compute_seconds / speed.step_seconds, 4) for speed in speeds if speed is not None]
    compute = speed_of(first["DDP"], work, prices, gpu)
    assert compute is not None, "an H100 computes in bf16"
    return {
        "trained": work.trained,
        "frozen": work.frozen,
        "images_a_gpu": first["DDP"].micro_batch_size,
        "compute_seconds": compute.compute_seconds,
        "sent_bytes": sent,
        "efficiency": efficiency,
    }


def _on(plan: PlanInput, way: str, ranks: int) -> PlanInput:
    """The same on more ranks."""
    replicas = max(1, ranks // NODE) if way == "HSDP" else 1
    engine = plan.engine.model_copy(update={"replicas": replicas})
    return replace(plan, world_size=ranks, micro_batches=ranks, engine=engine)


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
    yield f"| way | {' | '.join(f'memory, {_many(ranks)}' for ranks in few)} | {' | '.join(f'sent, {_many(ranks)}' for ranks in few)} |"
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


def plots(name: str, found: Mapping):
    """Memory, traffic and efficiency on each network over the number of GPUs."""
    memory = [
        Line(way, [[found["memory_bytes"][measured_key(way, ranks)] / 2**30] for ranks in MEASURED], colour)
        for colour, way in enumerate(WAYS)
    ]
    pictures = [line_plot(f"{name}: memory of a GPU", [str(ranks) for ranks in MEASURED], memory, x_label="GPUs", y_label="GiB")]
    pictures.append(_over_ranks(f"{name}: sent by a GPU in a step", RANKS[1:], lambda way: found["sent_bytes"][way][1:], 1e9, "GB"))
    rows = [beside(pictures)]
    shown = [
        _over_ranks(
            f"{name}: efficiency, {network.name}", RANKS, lambda way, on=network.name: found["efficiency"][on][way], 0.01, "% of a step"
        )
        for network in NETWORKS[::2]
    ]
    rows.append(beside(shown))
    return _below(rows)


def _over_ranks(title: str, ranks: Sequence[int], values: Callable[[str], Sequence[float]], unit: float, label: str):
    lines = [Line(way, [[value / unit] for value in values(way)], colour) for colour, way in enumerate(WAYS)]
    return line_plot(title, [str(number) for number in ranks], lines, x_label="GPUs, 8 a node", y_label=label)


def _below(pictures: Sequence):
    from PIL import Image

    column = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        column.paste(picture, (0, top))
        top += picture.height
    return column


def file_name(name: str) -> str:
    """Of its plots."""
    return "".join(letter if letter.isalnum() else "_" for letter in name.lower().replace(", ", "_"))


def _many(ranks: int) -> str:
    return f"{ranks} GPUs"


if __name__ == "__main__":
    main()
