"""What the parts of the paper's tiny diffusion are worth: attention heads, attention itself and the number of images, on faces.

Each variant is a run of tiny_diffusion_53m-tiny with one change, by the command line, kept below --root: the same command goes on where it
was. Its checkpoints draw images from the same noise, which are compared with held-out faces; so there is a curve over the steps. Writes
the figures as JSON, a table as Markdown, a plot and a sheet of pictures."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import final

import torch
from faces_runs import Pictures, Reader, Spread, check_settings, commit, drawn, folder_of, halfstep, kept, pack, rows_of, take_weights_away
from measure import machine
from plot import Line, line_plot

from data_shards.files import json_text, replace_file
from trainer.checkpoint import read_tensors
from trainer.manifest import read_checkpoint, verify_files
from trainer.prompting.sheet import SheetGroup, draw_sheet
from trainer.sample import png
from trainer.source import load_source

STYLE, HELD_OUT, SHOWN = "open-peeps", 512, 3


@final
@dataclass(frozen=True)
class Size:
    """How much is spent. images: of a measurement, drawn in `sampling_steps`; counts: training images of the variants, the base's in
    the middle; at: steps at which is measured; settings: changes to the recipe."""

    pixels: int = 32
    counts: tuple[int, int, int] = (1000, 3000, 10000)
    images: int = 256
    sampling_steps: int = 25
    at: tuple[int, ...] = (125, 250, 500, 1000)
    channels: str = "[32,64,128,128]"
    convolution: str = "[32,64,136,136]"
    settings: tuple[str, ...] = ()


FULL = Size()
QUICK = Size(
    pixels=16,
    counts=(64, 128, 256),
    images=32,
    sampling_steps=4,
    at=(10, 20),
    channels="[8,16,32,32]",
    convolution="[8,16,32,40]",
)


def variants(size: Size) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Number of images and changes to the recipe of each variant, the base first; each differs from it in one thing."""
    few, base, many = size.counts
    attends, none = f"model.channels={size.channels}", ("model.attention=[false,false,false,false]", f"model.channels={size.convolution}")
    return {
        f"8 heads, {base:,} images": (base, (attends,)),
        "2 heads": (base, (attends, "model.attention_heads=2")),
        "4 heads": (base, (attends, "model.attention_heads=4")),
        "convolutions": (base, none),
        f"{few:,} images": (few, (attends,)),
        f"{many:,} images": (many, (attends,)),
    }


def main() -> int:
    """Run what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="where shards and runs are kept; default: runs/ablations or runs/ablations_quick")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1))
    parser.add_argument("--quick", action="store_true", help="two minutes, one seed, a smoke test: nothing is learnt")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/ablations.json; of --quick: in --root")
    options = parser.parse_args()
    size, seeds = (QUICK, (0,)) if options.quick else (FULL, tuple(options.seeds))
    root = (options.root or Path("runs/ablations_quick" if options.quick else "runs/ablations")).absolute()
    out = options.out or (root / "ablations.json" if options.quick else Path(__file__).parent / "results" / "ablations.json")
    check_settings(root, asdict(size))
    for count in size.counts:
        pack(root / "shards" / str(count), STYLE, count=count, pixels=size.pixels)
    pack(root / "shards" / "held_out", STYLE, start=max(size.counts), count=HELD_OUT, pixels=size.pixels)
    reader = Reader({STYLE: root / "shards" / str(size.counts[1])}, {STYLE: root / "shards" / "held_out"})
    rows = [Row(**row) for row in rows_of(out, asdict(size))]
    for seed in seeds:
        runs = {name: Run(root, name, seed, size, options.ranks) for name in variants(size)}
        for name, (count, settings) in variants(size).items():
            if any((row.variant, row.seed) == (name, seed) for row in rows):
                continue
            runs[name].bring_forth(count, settings)
            rows += [Row(name, step, seed, reader.distance(runs[name].pictures(step), STYLE), commit()) for step in size.at]
            write(rows, out, size=size)
        if seed == seeds[0] and all(run.is_drawn() for run in runs.values()):
            sheet = [SheetGroup(f"step {step}", torch.stack([run.pictures(step)[:SHOWN] for run in runs.values()])) for step in size.at]
            replace_file(out.with_name(f"{out.stem}_pictures.png"), png(draw_sheet(list(runs), sheet).quantize(256)))
    return 0


@final
@dataclass(frozen=True)
class Row:
    """What was measured of one variant and seed after so many steps."""

    variant: str
    step: int
    seed: int
    distance: float
    commit: str


@final
@dataclass(frozen=True)
class Run:
    """One variant with one seed, below the root."""

    root: Path
    name: str
    seed: int
    size: Size
    ranks: int

    @property
    def folder(self) -> Path:
        """Where it is."""
        return folder_of(self.root, seed=self.seed, name=self.name)

    def pictures(self, step: int) -> Pictures:
        """What the averaged weights after `step` steps draw; made now where it was not before."""
        return kept(self._picture(step), lambda: self._draw(step))

    def is_drawn(self) -> bool:
        """Whether all pictures are there."""
        return all(self._picture(step).exists() for step in self.size.at)

    def bring_forth(self, count: int, settings: Sequence[str]) -> None:
        """Train to the end, draw at every step that is measured, and take the weights away, which are many."""
        if self.is_drawn():
            return
        every = self.size.at[0]
        words = (f"seed={self.seed}", f"data.shards={self.root}/shards/{count}", f"train.steps={self.size.at[-1]}", *settings)
        saves = (f"checkpoint.every_steps={every}", f"checkpoint.keep_every_steps={every}", "logging.sample_every_steps=0")
        run_dir = self.folder / "run"
        halfstep("train", "tiny_diffusion_53m-tiny", "--ranks", str(self.ranks), "--run-dir", str(run_dir), *words, *saves)
        for step in self.size.at:
            self.pictures(step)
        take_weights_away(run_dir)

    def _picture(self, step: int) -> Path:
        return self.folder / "pictures" / f"step_{step:06d}.npy"

    def _draw(self, step: int) -> Pictures:
        source = load_source(self.folder / "run")
        checkpoint = read_checkpoint(self.folder / "run" / "checkpoints" / f"step_{step:06d}")
        verify_files(checkpoint, checkpoint.files)
        source.model.load_state_dict({name: tensor.float() for name, tensor in read_tensors(checkpoint, "ema").items()})
        return drawn(source, steps=self.size.sampling_steps, count=self.size.images)


def write(rows: Sequence[Row], out: Path, *, size: Size) -> None:
    """The figures so far, their table and plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python benchmarks/ablations.py",
        "machine": machine(),
        "size": asdict(size),
        "rows": [asdict(row) for row in rows],
    }
    distances: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        distances.setdefault((row.variant, row.step), []).append(row.distance)
    spreads = {cell: Spread.of(values) for cell, values in distances.items()}
    names = list(dict.fromkeys(name for name, _ in spreads))
    lines = [f"| variant, distance after step | {' | '.join(map(str, size.at))} |", "| --- |" + " --- |" * len(size.at)]
    lines += [f"| {name} | {' | '.join(str(spreads[name, step]) for step in size.at)} |" for name in names]
    plot = line_plot(
        "Frechet distance to held-out faces",
        [str(step) for step in size.at],
        [Line(name, [spreads[name, step].values for step in size.at], colour=number) for number, name in enumerate(names)],
        x_label="optimizer steps of 16 images",
        y_label="squared feature units",
    )
    replace_file(out, json_text(result))
    replace_file(out.with_suffix(".md"), "\n".join(lines) + "\n")
    replace_file(out.with_suffix(".png"), png(plot))
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
