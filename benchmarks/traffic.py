"""Bytes that ranks really send in an optimizer step, counted on their sockets, beside what `halfstep plan` says.

Ranks of gloo on loopback build each engine as `halfstep train` does, take warm-up steps, then as many again that are counted: what
Linux's TCP_INFO says that this process's sockets have sent, headers aside, so that set-up does not count and nothing else on the
machine can. One JSON object a line; `ratio` is counted by predicted, the mean of all ranks. No speed is measured."""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from measure import machine, put_table, run_ranks
from sockets import sent_bytes

from data_shards import ranks
from trainer.config import RunConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.engines.engine import LossPerImage
from trainer.models.network import Network
from trainer.plan.from_recipe import plan_input
from trainer.plan.traffic import bytes_sent
from trainer.plan.work import work_of
from trainer.tasks.build import build_task
from trainer.train import build_engine

SIDE = 32
RESULTS, DOCS = Path(__file__).parent / "results" / "traffic.json", Path(__file__).parents[1] / "docs" / "scale.md"


@final
@dataclass(frozen=True)
class Case:
    """An engine, as words of the command line, and the micro-batches of a rank in a step."""

    name: str
    words: tuple[str, ...]
    accumulation: int

    def config(self, recipe: str, world_size: int) -> RunConfig:
        """The recipe with one image a micro-batch: traffic does not depend on their number."""
        data = ("data.micro_batch_size=1", f"data.global_batch_size={world_size * self.accumulation}")
        return load_recipe(recipe_path(recipe), ["distill=null", *data, *self.words])


ENGINES = {
    "replicated": ("engine.kind=replicated",),
    "fsdp_fp32": ("engine.kind=fsdp", "engine.precision=fp32"),
    "fsdp_bf16": ("engine.kind=fsdp", "engine.precision=bf16"),
    "hsdp_bf16": ("engine.kind=fsdp", "engine.precision=bf16", "engine.replicas=2"),
    "zero_1": ("engine.kind=deepspeed", "engine.zero_stage=1"),
    "zero_2": ("engine.kind=deepspeed", "engine.zero_stage=2"),
    "zero_3": ("engine.kind=deepspeed", "engine.zero_stage=3"),
}
CASES = [Case(f"{name}_x{accumulation}", words, accumulation) for name, words in ENGINES.items() for accumulation in (1, 2)]


def main() -> None:
    """Print a JSON line for each engine, number of ranks and number of micro-batches of a rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one counted step on 4 ranks, a minute or two; else 5 on 4 and 8")
    parser.add_argument("--ranks", type=int, nargs="*", help="numbers of ranks (4 with --quick, else 4 8)")
    parser.add_argument("--engines", nargs="*", default=list(ENGINES), choices=list(ENGINES), help="only these")
    parser.add_argument("--recipe", default="tiny_diffusion_53m-tiny", help="of pixels")
    parser.add_argument("--steps", type=int, help="that are counted")
    parser.add_argument("--docs", action="store_true", help=f"keep the lines in results/{RESULTS.name} and their table in docs/{DOCS.name}")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if case.name.rsplit("_", 1)[0] in options.engines]
    steps = options.steps or (1 if options.quick else 5)
    if options.rank:
        _rank(options.rank, options.recipe, cases, steps=steps)
        return
    lines = []
    for world_size in options.ranks or ([4] if options.quick else [4, 8]):
        with tempfile.TemporaryDirectory() as name:
            out = Path(name) / "counted"
            words = [__file__, "--rank", str(out), "--recipe", options.recipe, "--steps", str(steps), "--engines", *options.engines]
            run_ranks(words, ranks=world_size)
            for case, counted in zip(cases, json.loads(out.read_text()), strict=True):
                lines.append(_line(case, options.recipe, counted, steps=steps))
                sys.stdout.write(json.dumps(lines[-1]) + "\n")
                sys.stdout.flush()
    if options.docs:
        RESULTS.write_text(json.dumps(lines, indent=1) + "\n", encoding="utf-8")
        put_table(DOCS, "traffic", table(lines))


def _line(case: Case, recipe: str, counted: Sequence[float], *, steps: int) -> dict[str, object]:
    """counted: bytes a step of each rank."""
    plan = plan_input(case.config(recipe, len(counted)), world_size=len(counted), ranks_per_node=len(counted), on_gpu=False)
    predicted = dict(bytes_sent(plan, work_of(plan).parts))
    mean, whole = sum(counted) / len(counted), sum(predicted.values())
    return {
        "name": f"traffic_{case.name}_{len(counted)}_ranks",
        "ratio": round(mean / whole, 4),
        "repeats": steps,
        "against": "what plan says",
        "engine": case.name.rpartition("_")[0],
        "accumulation": case.accumulation,
        "ranks": len(counted),
        "counted_bytes_per_step": round(mean),
        "most_of_a_rank": round(max(counted)),
        "predicted_bytes_per_step": whole,
        "predicted": predicted,
        "machine": machine(),
    }


def table(lines: Sequence[Mapping]) -> Iterator[str]:
    """Of all lines, a row for each engine and number of micro-batches: predicted bytes and counted ones by them."""
    worlds = sorted({line["ranks"] for line in lines})
    yield f"| engine | micro-batches | {' | '.join(f'predicted on {ranks} | counted' for ranks in worlds)} |"
    yield "| --- | --- |" + " --- | --- |" * len(worlds)
    rows: dict[tuple[str, int], dict[int, Mapping]] = {}
    for line in lines:
        rows.setdefault((line["engine"], line["accumulation"]), {})[line["ranks"]] = line
    for (engine, accumulation), found in rows.items():
        cells = (f"{found[ranks]['predicted_bytes_per_step'] / 1e6:.1f} MB | {found[ranks]['ratio']:.4f}" for ranks in worlds)
        yield f"| `{engine}` | {accumulation} | {' | '.join(cells)} |"


def _rank(out: Path, recipe: str, cases: Sequence[Case], *, steps: int) -> None:
    """One rank of all cases, one after the other; rank 0 writes what all ranks have counted."""
    ranks.init_process_group(timeout_seconds=600)
    rows = []
    for case in cases:
        config = case.config(recipe, ranks.world_size())
        counted = torch.tensor([_bytes_a_step(config, out.parent, steps=steps)], dtype=torch.float64)
        rows.append(ranks.all_gather_tensor(counted).flatten().tolist())
    if ranks.is_rank_0():
        out.write_text(json.dumps(rows))
    ranks.barrier()
    os._exit(0)  # gloo's threads may abort while the interpreter tears down


def _bytes_a_step(config: RunConfig, folder: Path, *, steps: int) -> float:
    """Of this rank. The first step makes what later ones keep, so it does not count."""
    engine = build_engine(config, build_task(config, folder, SIDE))

    def losses() -> Iterator[LossPerImage]:
        x_t, timestep = torch.zeros(1, 3, SIDE, SIDE), torch.full((1,), 500.0)

        def loss_per_image(network: Network) -> torch.Tensor:
            return network(x_t, timestep).float().square().flatten(1).mean(1)

        yield from [loss_per_image] * (config.micro_batches // ranks.world_size())

    before = 0
    for step in range(1 + steps):
        if step == 1:
            ranks.barrier()
            before = sent_bytes()
        engine.step(step, losses(), learning_rate=1e-5, votes=(0.0,), loss_limit=None)
    ranks.barrier()
    return (sent_bytes() - before) / steps


if __name__ == "__main__":
    main()
