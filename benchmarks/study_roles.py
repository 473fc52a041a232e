"""On which images is a fine-tuned teacher best halved? Four roles of data, two samplers, 16 to 1 steps, several seeds, measured on faces.

A teacher of one style of faces (the source) is fine-tuned to another one, and its 32 sampling steps are halved to 1 on images of the
source, of the fine-tuning, of both, or of its own. Every run is one of the shipped recipes by the command line, kept below --root: the
same command goes on where it was. Then images are drawn from the same noise by every student, and by the teacher in as few steps, and
compared with held-out faces of both styles. Writes the figures as JSON, a table as Markdown, a plot and a sheet of pictures."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, final

import torch
from faces_runs import Pictures, Reader, Spread, check_settings, commit, drawn, halfstep, kept, pack, rows_of, take_weights_away
from measure import machine
from PIL import Image
from plot import Line, beside, line_plot

from data_shards.files import json_text, replace_file
from trainer.chain import read_chain
from trainer.config_sections import Sampler
from trainer.prompting.sheet import SheetGroup, draw_sheet
from trainer.sample import png
from trainer.source import load_source

Style = Literal["source", "finetune"]
STYLES: Mapping[Style, str] = {"source": "open-peeps", "finetune": "voxel-art"}
ROLES = ("source", "finetune", "mixture", "teacher_samples")
SAMPLERS: tuple[Sampler, ...] = ("ddim", "ancestral")
STEPS = (16, 8, 4, 2, 1)
HELD_OUT = 512
SHOWN = 2
TEACHER, BASE = "no_halving", "source_teacher"
"""Rows of the teacher itself, run in as few steps, and of the one that it was fine-tuned from."""


@final
@dataclass(frozen=True)
class Size:
    """How much is spent. tuned, samples: images of the fine-tuning and of the teacher's own; images: of a measurement;
    settings: changes to the recipe of both teachers; distill: to those of the halvings."""

    pixels: int = 32
    faces: int = 4000
    tuned: int = 2000
    samples: int = 2000
    images: int = 512
    draw_steps: int = 32
    settings: tuple[str, ...] = ()
    tuning: tuple[str, ...] = ()
    distill: tuple[str, ...] = ()


FULL = Size()
QUICK = Size(
    pixels=16,
    faces=256,
    tuned=128,
    samples=64,
    images=32,
    draw_steps=4,
    settings=(
        "model.channels=[16,32]",
        "model.attention=[false,true]",
        "model.attention_heads=2",
        "train.steps=30",
        "lr_schedule.warmup_steps=3",
    ),
    tuning=("train.steps=20",),
    distill=("distill.updates=2",),
)


def main() -> int:
    """Run what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="where shards and runs are kept; default: runs/study_roles or runs/study_roles_quick")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--quick", action="store_true", help="two minutes, one seed, a smoke test: nothing is learnt")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/study_roles.json; of --quick: in --root")
    options = parser.parse_args()
    size, seeds = (QUICK, (0,)) if options.quick else (FULL, tuple(options.seeds))
    root = (options.root or Path("runs/study_roles_quick" if options.quick else "runs/study_roles")).absolute()
    out = options.out or (root / "study_roles.json" if options.quick else Path(__file__).parent / "results" / "study_roles.json")
    check_settings(root, asdict(size))
    for role, style in STYLES.items():
        count = size.faces if role == "source" else size.tuned
        pack(root / "shards" / role, style, count=count, pixels=size.pixels)
        pack(root / "shards" / f"held_out_{role}", style, start=count, count=HELD_OUT, pixels=size.pixels)
    shards = {role: root / "shards" / role for role in STYLES}
    reader = Reader(shards, {role: root / "shards" / f"held_out_{role}" for role in STYLES})
    rows = [Row(**row) for row in rows_of(out, asdict(size))]
    for seed in (Seed(root, seed, size, options.ranks) for seed in seeds):
        known = {(row.role, row.sampler) for row in rows if row.seed == seed.seed}
        chains: list[tuple[str, Sampler]] = [(role, sampler) for role in (TEACHER, BASE, *ROLES) for sampler in SAMPLERS]
        for role, sampler in chains:
            if (role, sampler) not in known:
                rows += seed.measured(role, sampler, reader)
                write(rows, out, size=size)
        if seed.seed == seeds[0] and seed.is_drawn():
            replace_file(out.with_name(f"{out.stem}_pictures.png"), png(_sheet(seed).quantize(256)))
    write(rows, out, size=size)
    return 0


@final
@dataclass(frozen=True)
class Seed:
    """The runs of one seed below the root."""

    root: Path
    seed: int
    size: Size
    ranks: int

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.root / f"seed_{self.seed}"

    def pictures(self, role: str, sampler: Sampler, steps: int) -> Pictures:
        """What a student (or a teacher) draws, from noise that is the same for all; made now where it was not before."""
        return kept(self._path(role, sampler, steps), lambda: self._draw(role, sampler, steps))

    def measured(self, role: str, sampler: Sampler, reader: Reader) -> "list[Row]":
        """What came of one chain."""
        self.bring_forth(role, sampler)
        found = {steps: self.pictures(role, sampler, steps) for steps in STEPS}
        return [
            Row(role, sampler, steps, self.seed, reader.distance(each, "finetune"), reader.distance(each, "source"), commit())
            for steps, each in found.items()
        ]

    def bring_forth(self, role: str, sampler: Sampler) -> None:
        """Run one chain to its end, draw all its pictures, and take its weights away, which are many."""
        if all(self._path(role, sampler, steps).exists() for steps in STEPS):
            return
        self._teachers()
        if role not in (TEACHER, BASE):
            self._halve(role, sampler)
        for steps in STEPS:
            self.pictures(role, sampler, steps)
        if role not in (TEACHER, BASE):
            for stage in read_chain(self.folder / f"{role}_{sampler}"):
                if stage.trained_here:
                    take_weights_away(stage.run_dir)

    def is_drawn(self) -> bool:
        """Whether all pictures of the sheet are there; they are not where another machine has measured."""
        return all(self._path(role, sampler, steps).exists() for role in (TEACHER, *ROLES) for sampler in SAMPLERS for steps in STEPS)

    def _path(self, role: str, sampler: Sampler, steps: int) -> Path:
        return self.folder / "pictures" / f"{role}_{sampler}_{steps:02d}.npy"

    def _draw(self, role: str, sampler: Sampler, steps: int) -> Pictures:
        folder = {TEACHER: self.folder / "finetuned", BASE: self.folder / "source"}.get(role, self.folder / f"{role}_{sampler}")
        source = load_source(folder, steps)
        return drawn(source, steps=steps, count=self.size.images, sampler=sampler)

    def _teachers(self) -> None:
        source, tuned, samples = (self.folder / name for name in ("source", "finetuned", "shards_teacher_samples"))
        size, common = self.size, ("--ranks", str(self.ranks))
        shards = {name: f"data.shards={self.root}/shards/{name}" for name in STYLES}
        if not (source / "export").exists():
            halfstep("train", "faces_source", *common, "--run-dir", str(source), f"seed={self.seed}", shards["source"], *size.settings)
        if not (tuned / "export").exists():
            words = (f"model.start={source}", f"seed={self.seed}", shards["finetune"], *size.settings, *size.tuning)
            halfstep("train", "faces_finetuned", *common, "--run-dir", str(tuned), *words)
        if not (samples / "index.json").exists():
            # noise that no measurement starts from
            words = (
                "--count",
                str(size.samples),
                "--steps",
                str(size.draw_steps),
                "--seed",
                str(1_000_000 * (self.seed + 1)),
                "--precision",
                "bf16",
            )
            halfstep("shards", "draw", str(tuned), *words, "--out", str(samples), *common)

    def _halve(self, role: str, sampler: Sampler) -> None:
        source, tuned = (f"{self.root}/shards/{name}" for name in STYLES)
        data = {
            "source": f"data.shards={source}",
            "finetune": f"data.shards={tuned}",
            "mixture": f"data.mixture=[{{shards: {source}, weight: 1}}, {{shards: {tuned}, weight: 1}}]",
            "teacher_samples": f"data.shards={self.folder}/shards_teacher_samples",
        }[role]
        words = (f"seed={self.seed}", f"distill.target={sampler}", f"distill.teacher={self.folder}/finetuned", data, *self.size.distill)
        where = ("--ranks", str(self.ranks), "--run-dir", str(self.folder / f"{role}_{sampler}"))
        halfstep("distill", f"distill_finetuned_{role}-tiny", *where, *words)


@final
@dataclass(frozen=True)
class Row:
    """What was measured of one model, sampler, step count and seed."""

    role: str
    sampler: Sampler
    steps: int
    seed: int
    to_finetune: float
    to_source: float
    commit: str


Cell = tuple[str, str, int]
"""Role, sampler and steps."""


def write(rows: Sequence[Row], out: Path, *, size: Size) -> None:
    """The figures so far, their table and, once all rows are there, the plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    cells: dict[Cell, list[Row]] = {}
    for row in rows:
        cells.setdefault((row.role, row.sampler, row.steps), []).append(row)
    figures = {
        "to_finetune": {cell: Spread.of([row.to_finetune for row in mine]) for cell, mine in cells.items()},
        "to_source": {cell: Spread.of([row.to_source for row in mine]) for cell, mine in cells.items()},
    }
    report = f"{table(figures)}\n{_differences(cells)}"
    result = {
        "command": "python benchmarks/study_roles.py",
        "machine": machine(),
        "size": asdict(size),
        "styles": dict(STYLES),
        "rows": [asdict(row) for row in rows],
    }
    replace_file(out, json_text(result))
    replace_file(out.with_suffix(".md"), report)
    if len(cells) == (2 + len(ROLES)) * len(SAMPLERS) * len(STEPS):
        replace_file(out.with_suffix(".png"), png(_plot(figures)))
    sys.stdout.write(report)


TITLES = {"to_finetune": "fine-tuned style", "to_source": "source style"}


def table(figures: Mapping[str, Mapping[Cell, Spread]]) -> str:
    """Distances to the fine-tuned style, and below them to the source's: mean +- standard deviation over the seeds."""
    lines = []
    for distance, spreads in figures.items():
        lines += [f"| to the {TITLES[distance]}: data, sampler | {' | '.join(map(str, STEPS))} |", "| --- |" + " --- |" * len(STEPS)]
        for role, sampler in dict.fromkeys((role, sampler) for role, sampler, _ in spreads):
            found = " | ".join(str(spreads[role, sampler, steps]) for steps in STEPS)
            lines.append(f"| {_words(role)}, {sampler} | {found} |")
        lines.append("")
    return "\n".join(lines)


def _differences(cells: Mapping[Cell, Sequence[Row]]) -> str:
    """How much farther from the fine-tuned style than the student of the fine-tuning's images, each seed by itself: seeds differ in
    their teachers more than roles do."""
    lines = [f"| farther than fine-tuning | {' | '.join(map(str, STEPS))} |", "| --- |" + " --- |" * len(STEPS)]
    for role in ROLES:
        for sampler in SAMPLERS:
            found = []
            for steps in STEPS:
                base = {row.seed: row.to_finetune for row in cells.get(("finetune", sampler, steps), ())}
                rows = [row for row in cells.get((role, sampler, steps), ()) if row.seed in base]
                found.append(str(Spread.of([row.to_finetune - base[row.seed] for row in rows])) if rows else "")
            if role != "finetune" and any(found):
                lines.append(f"| {_words(role)}, {sampler} | {' | '.join(found)} |")
    return "\n".join(lines) + "\n"


def _words(role: str) -> str:
    return {TEACHER: "teacher as it is", BASE: "source's teacher as it is", "finetune": "fine-tuning"}.get(role, role.replace("_", " "))


def _plot(figures: Mapping[str, Mapping[Cell, Spread]]) -> Image.Image:
    """A plot for each distance; solid: DDIM, dashed: ancestral."""
    return beside(
        [
            line_plot(
                f"Frechet distance to held-out faces of the {TITLES[distance]}",
                [str(steps) for steps in STEPS],
                [
                    Line(
                        f"{_words(role)}, {sampler}",
                        [spreads[role, sampler, steps].values for steps in STEPS],
                        colour=number,
                        dashed=sampler == "ancestral",
                    )
                    for number, role in enumerate((*ROLES, TEACHER))
                    for sampler in SAMPLERS
                ],
                x_label="sampling steps",
                y_label="squared feature units",
            )
            for distance, spreads in figures.items()
        ]
    )


def _sheet(seed: Seed) -> Image.Image:
    """The first pictures of each row of one seed, from the same noise."""
    roles: list[tuple[str, Sampler]] = [(role, sampler) for role in (TEACHER, *ROLES) for sampler in SAMPLERS]
    groups = [
        SheetGroup(f"{steps} step{'' if steps == 1 else 's'}", torch.stack([seed.pictures(*row, steps)[:SHOWN] for row in roles]))
        for steps in STEPS
    ]
    return draw_sheet([f"{_words(role)}, {sampler}" for role, sampler in roles], groups)


if __name__ == "__main__":
    sys.exit(main())
