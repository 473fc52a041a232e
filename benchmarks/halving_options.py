"""What each option of halving is worth: quality by step count and cost of the same chain with one thing changed, on faces.

The demo's teacher is trained once; each variant halves its 32 sampling steps to 1 by the command line, with one change to the base,
which is the demo's recipe with loss v_mse, kept below --root: the same command goes on where it was. Every student draws images from
the same noise, which are compared with held-out faces. Writes the figures as JSON, a table as Markdown and a sheet of pictures."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from faces_runs import Pictures, Reader, Spread, check_settings, commit, drawn, folder_of, halfstep, kept, pack, rows_of, take_weights_away
from measure import machine

from data_shards.files import json_text, replace_file
from trainer.chain import read_chain
from trainer.prompting.sheet import SheetGroup, draw_sheet
from trainer.report.cost import Cost
from trainer.report.gather import read_stage
from trainer.sample import png
from trainer.source import load_source

STYLE, HELD_OUT, SHOWN = "open-peeps", 2000, 3
STEPS = (16, 8, 4, 2, 1)
START = 32
BASE, TEACHER = "base", "teacher as it is"


@final
@dataclass(frozen=True)
class Size:
    """How much is spent. images: of a measurement; updates, rates: of the base's stages; settings: changes to the recipe of teacher and
    chains."""

    pixels: int = 32
    faces: int = 6000
    images: int = 512
    updates: tuple[int, ...] = (85, 240, 155, 180, 220)
    rates: tuple[float, ...] = (3e-4, 5e-4, 5e-4, 6e-4, 6e-4)
    settings: tuple[str, ...] = ()


FULL = Size()
QUICK = Size(
    pixels=16,
    faces=128,
    images=32,
    updates=(2, 2, 2, 2, 2),
    settings=(
        "model.channels=[16,32]",
        "model.attention=[false,true]",
        "model.attention_heads=2",
        "train.steps=20",
        "lr_schedule.warmup_steps=2",
    ),
)


def variants(size: Size) -> dict[str, tuple[str, ...]]:
    """Changes to the base's recipe, by what they are called."""

    def updates(*counts: float) -> str:
        return f"distill.updates={_listed([round(count) for count in counts])}"

    def rates(*each: float) -> str:
        return f"distill.learning_rate={_listed([round(rate, 5) for rate in each])}"

    def schedule(kind: str, *, warmup: int = 20) -> str:
        return f"distill.lr_schedule={{kind: {kind}, warmup_steps: {warmup}}}"

    first, second, third, fourth, fifth = size.updates
    by_need = f"distill.stop_when={{every_steps: {max(1, first // 4)}, images: 32}}"
    return {
        BASE: (),
        "twice the batch, half the updates": (
            "distill.global_batch_size=32",
            "distill.micro_batch_size=16",
            updates(*(count / 2 for count in size.updates)),
            schedule("linear", warmup=10),
        ),
        "twice the updates": (updates(*(2 * count for count in size.updates)),),
        "half the updates": (updates(*(count / 2 for count in size.updates)),),
        "constant rate, stages end by need": (schedule("constant"), by_need, updates(*(3 * count for count in size.updates))),
        "16 skipped": ("distill.skip=[16]", updates(first + second, third, fourth, fifth), rates(*size.rates[1:])),
        "2 skipped": ("distill.skip=[2]", updates(first, second, third, fourth + fifth), rates(*size.rates[:3], size.rates[4])),
        "8 and 2 skipped": ("distill.skip=[8,2]", updates(first, second + third, fourth + fifth), rates(*size.rates[::2])),
        "one rate for all stages": ("distill.learning_rate=5e-4",),
        "rates x 1.6": (rates(*(1.6 * rate for rate in size.rates)),),
        "constant rate": (schedule("constant"),),
        "no average of the weights": ("distill.ema_decay=0.0",),
        "times drawn alone": ("distill.stratified=false",),
        "feature weight 0.1 (last two stages)": ("distill.feature_weight=0.1",),
        "target clipped": ("distill.clip_target=true",),
        "teacher in fp32": ("distill.teacher_precision=fp32",),
        "loss min_snr": ("distill.loss=min_snr",),
        "loss snr_trunc": ("distill.loss=snr_trunc",),
        "loss x_mse": ("distill.loss=x_mse",),
    }


def _listed(values: Sequence[float]) -> str:
    return str(list(values)).replace(" ", "")


@final
@dataclass(frozen=True)
class Row:
    """What came of one variant: distances by step count over the seeds, and what its stages took, of the first seed."""

    variant: str
    distances: Mapping[int, Spread]
    cost: Cost
    commit: str

    @classmethod
    def read(cls, row: Mapping[str, Any]) -> "Row":
        """One that was written."""
        distances = {int(steps): Spread(**each) for steps, each in row["distances"].items()}
        return cls(row["variant"], distances, Cost(**row["cost"]), row["commit"])


def main() -> int:
    """Run what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="where all is kept; default: runs/halving_options or runs/halving_options_quick")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0,))
    parser.add_argument("--base-seeds", type=int, nargs="+", default=(0, 1, 2), help="of the base, whose spread is the noise")
    parser.add_argument("--quick", action="store_true", help="ten minutes, one seed, a smoke test: nothing is learnt")
    parser.add_argument("--only", nargs="+", metavar="VARIANT", help="these alone, by their names in the table")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/halving_options.json; of --quick: in --root")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    seeds, base_seeds = ((0,), (0,)) if options.quick else (tuple(options.seeds), tuple(options.base_seeds))
    root = (options.root or Path("runs/halving_options_quick" if options.quick else "runs/halving_options")).absolute()
    out = options.out or (root / "figures.json" if options.quick else Path(__file__).parent / "results" / "halving_options.json")
    check_settings(root, asdict(size))
    pack(root / "faces", STYLE, count=size.faces, pixels=size.pixels)
    pack(root / "held_out", STYLE, start=size.faces, count=HELD_OUT, pixels=size.pixels)
    reader = Reader({STYLE: root / "faces"}, {STYLE: root / "held_out"})
    chosen = {name: words for name, words in variants(size).items() if options.only is None or name in options.only}
    found = {row.variant: row for row in map(Row.read, rows_of(out, asdict(size)))}
    for name in (TEACHER, *chosen):
        if name in found:
            continue
        chains = [Chain(root, name, seed, size, options.ranks) for seed in {TEACHER: seeds[:1], BASE: base_seeds}.get(name, seeds)]
        for chain in chains:
            chain.bring_forth(chosen.get(name, ()))
        distances = [{steps: reader.distance(chain.pictures(steps), STYLE) for steps in STEPS if chain.draws(steps)} for chain in chains]
        found[name] = Row(name, _spreads(distances), chains[0].cost(), commit())
        write([found[name] for name in (TEACHER, *variants(size)) if name in found], out, seeds=seeds, size=size)
    first = {name: Chain(root, name, seeds[0], size, options.ranks) for name in (TEACHER, *chosen)}
    if all(chain.draws(1) for chain in first.values()):
        replace_file(out.with_name(f"{out.stem}_pictures.png"), sheet(first))
    return 0


def _spreads(found: Sequence[Mapping[int, float]]) -> dict[int, Spread]:
    return {steps: Spread.of([each[steps] for each in found]) for steps in found[0]}


@final
@dataclass(frozen=True)
class Chain:
    """One variant with one seed, below the root; of the teacher its training."""

    root: Path
    name: str
    seed: int
    size: Size
    ranks: int

    @property
    def folder(self) -> Path:
        """Where it is."""
        return folder_of(self.root, seed=self.seed, name=self.name)

    def draws(self, steps: int) -> bool:
        """Whether a model was made for so many steps; the teacher is run in any."""
        return self._picture(steps).exists()

    def pictures(self, steps: int) -> Pictures:
        """What was drawn in so many steps."""
        return kept(self._picture(steps), lambda: self._draw(steps))

    def cost(self) -> Cost:
        """What its training took."""
        return Cost.of([read_stage(run_dir) for run_dir in self._runs()])

    def bring_forth(self, words: Sequence[str]) -> None:
        """Run to the end, draw all pictures, and take the weights of students away, which are many."""
        if self._is_drawn():
            return
        common = ("--ranks", str(self.ranks), f"data.shards={self.root}/faces", *self.size.settings, "logging.sample_every_steps=0")
        teacher = self.root / "teacher"
        if self.name == TEACHER:
            if not (teacher / "export").exists():
                halfstep("train", "demo", *common, "--run-dir", str(teacher), "distill=null")
        else:
            updates, rates = _listed(self.size.updates), _listed(self.size.rates)
            base = {"teacher": teacher, "start_steps": START, "updates": updates, "learning_rate": rates, "loss": "v_mse"}
            changed = {word.partition("=")[0] for word in words}
            own = [f"distill.{key}={value}" for key, value in base.items() if f"distill.{key}" not in changed]
            halfstep("distill", "demo", *common, "--run-dir", str(self.folder / "chain"), f"seed={self.seed}", *own, *words)
        for steps in self._runs().values():
            for count in steps:
                self.pictures(count)
        if self.name != TEACHER:
            for run_dir in self._runs():
                take_weights_away(run_dir)

    def _runs(self) -> dict[Path, tuple[int, ...]]:
        """The runs that it trains, and the step counts in which each draws; none before it is begun."""
        if self.name == TEACHER:
            return {self.root / "teacher": STEPS}
        chain = self.folder / "chain"
        stages = read_chain(chain) if (chain / "chain.json").exists() else ()
        return {stage.run_dir: (stage.steps,) for stage in stages if stage.trained_here}

    def _is_drawn(self) -> bool:
        runs = self._runs()
        return bool(runs) and all(self.draws(count) for counts in runs.values() for count in counts)

    def _picture(self, steps: int) -> Path:
        return self.folder / "pictures" / f"in_{steps:02d}.npy"

    def _draw(self, steps: int) -> Pictures:
        source = load_source(self.root / "teacher") if self.name == TEACHER else load_source(self.folder / "chain", steps)
        return drawn(source, steps=steps, count=self.size.images)


def write(rows: Sequence[Row], out: Path, *, seeds: Sequence[int], size: Size) -> None:
    """The figures so far and their table."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python benchmarks/halving_options.py",
        "machine": machine(),
        "seeds": list(seeds),
        "size": asdict(size),
        "rows": [asdict(row) for row in rows],
    }
    whole = next(row.cost for row in rows if row.variant == TEACHER)
    lines = [
        f"| variant, distance at steps | {' | '.join(map(str, STEPS))} | updates | image evaluations |",
        "| --- |" + " --- |" * (len(STEPS) + 2),
    ]
    for row in rows:
        cells = [str(row.distances.get(steps, "")) for steps in STEPS]
        cost, share = row.cost, row.variant != TEACHER
        cells += [
            f"{cost.updates:,}" + (f" ({cost.updates / whole.updates:.2f})" if share else ""),
            f"{cost.evaluations:,}" + (f" ({cost.evaluations / whole.evaluations:.2f})" if share else ""),
        ]
        lines.append(f"| {row.variant} | {' | '.join(cells)} |")
    replace_file(out, json_text(result))
    replace_file(out.with_suffix(".md"), "\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()


def sheet(chains: Mapping[str, Chain]) -> bytes:
    """The first pictures of each variant in 4 steps and in 1, from the same noise, as a PNG."""
    groups = [
        SheetGroup(f"{steps} step{'' if steps == 1 else 's'}", torch.stack([chain.pictures(steps)[:SHOWN] for chain in chains.values()]))
        for steps in (4, 1)
    ]
    return png(draw_sheet(list(chains), groups).quantize(128))


if __name__ == "__main__":
    sys.exit(main())
