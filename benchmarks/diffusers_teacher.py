"""A teacher that plain diffusers code has trained (eps, linear betas, T = 1000), halved by `halfstep distill` from 1000 to 4 steps.

First diffusers alone trains a UNet2DModel on faces and saves a DDPMPipeline; then the recipe faces_from_diffusers halves that folder,
with a change of the head to v on the way, and exports the last student. Everything is kept below --root: the same command goes on where
it was. Of every stage images are drawn, from the same noise, by the student, by the student at its update 0 (its teacher's weights in as
many steps), and by the first teacher in as many DDIM steps; their distances to held-out faces are the table. Writes JSON, Markdown and a
plot."""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import cast, final

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from faces_runs import Pictures, Reader, Spread, check_settings, commit, halfstep, kept, pack, read
from measure import machine
from plot import Line, line_plot

from data_shards.files import json_text, replace_file
from trainer.chain import ChainStage, read_chain
from trainer.sample import draw_images, png
from trainer.source import load_source

STYLE, HELD_OUT, BATCH = "open-peeps", 512, 32
SAVE_EVERY = 100
FEW_STEPS = 63
"""Up to so many sampling steps are measured several times, from different noise, which says how noisy a distance is."""
MANY_STEPS_IMAGES = 128
"""At most so many images are drawn in more steps than that: 500 steps of 256 images are 20 minutes of a core."""


@final
@dataclass(frozen=True)
class Size:
    """How much is spent. images: of a measurement; repeats: measurements of few steps; settings: changes to the recipe."""

    pixels: int = 32
    faces: int = 4000
    channels: tuple[int, ...] = (32, 64, 128, 128)
    updates: int = 1400
    images: int = 256
    repeats: int = 3
    settings: tuple[str, ...] = ()


FULL = Size()
QUICK = Size(
    pixels=16,
    faces=256,
    channels=(16, 32),
    updates=20,
    images=16,
    repeats=2,
    settings=(
        "distill.start_steps=32",
        "distill.updates=2",
        "distill.learning_rate=1e-4",
        "distill.head_change={at_steps: 16, updates: 4}",
    ),
)


def main() -> int:
    """Run what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, help="where all is kept; default: runs/diffusers_teacher or runs/diffusers_teacher_quick")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="two minutes, a smoke test: nothing is learnt")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/diffusers_teacher.json; of --quick: in --root")
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    root = (options.root or Path("runs/diffusers_teacher_quick" if options.quick else "runs/diffusers_teacher")).absolute()
    out = options.out or (root / "figures.json" if options.quick else Path(__file__).parent / "results" / "diffusers_teacher.json")
    check_settings(root, asdict(size))
    faces, held_out, teacher, chain = (root / name for name in ("faces", "held_out", "teacher", "chain"))
    pack(faces, STYLE, count=size.faces, pixels=size.pixels)
    pack(held_out, STYLE, start=size.faces, count=HELD_OUT, pixels=size.pixels)
    if not (teacher / "model_index.json").exists():
        train_teacher(teacher, read(faces).images.float() / 127.5 - 1, size=size, saved=root / "teacher_unfinished.pt")
    words = (f"distill.teacher={teacher}", f"data.shards={faces}", *size.settings)
    halfstep("distill", "faces_from_diffusers", "--ranks", str(options.ranks), "--run-dir", str(chain), *words)
    stages = read_chain(chain)
    if not (root / "export").exists():
        halfstep("export", str(chain), "--steps", str(stages[-1].steps), "--out", str(root / "export"))
    write(measure(root, stages, Reader({STYLE: faces}, {STYLE: held_out}), size=size), out, size=size)
    return 0


def train_teacher(folder: Path, faces: torch.Tensor, *, size: Size, saved: Path) -> None:
    """diffusers' own training example in its shortest form; goes on from `saved` after an interruption. faces: in [-1, 1]."""
    torch.manual_seed(0)
    levels = len(size.channels)
    unet = UNet2DModel(
        sample_size=size.pixels,
        block_out_channels=size.channels,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * (levels // 2) + ("AttnDownBlock2D",) * (levels - levels // 2),
        up_block_types=("AttnUpBlock2D",) * (levels - levels // 2) + ("UpBlock2D",) * (levels // 2),
        attention_head_dim=size.channels[-1] // 4,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", prediction_type="epsilon", clip_sample=True)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0)
    rates = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=min(100, size.updates // 4), num_training_steps=size.updates)
    average = EMAModel(unet.parameters(), decay=0.995, use_ema_warmup=True, power=0.75)
    parts = {"unet": unet, "optimizer": optimizer, "rates": rates, "average": average}
    start = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        start = state.pop("step")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    for step in range(start, size.updates):
        draw = torch.Generator().manual_seed(step)
        images = faces[torch.randint(len(faces), (BATCH,), generator=draw)]
        noise, timesteps = torch.randn(images.shape, generator=draw), torch.randint(1000, (BATCH,), generator=draw)
        noisy = scheduler.add_noise(images, noise, cast("torch.IntTensor", timesteps))
        loss = F.mse_loss(unet(noisy, timesteps, return_dict=False)[0], noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        average.step(unet.parameters())
        if (step + 1) % SAVE_EVERY == 0:
            torch.save({"step": step + 1, **{name: part.state_dict() for name, part in parts.items()}}, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)
            sys.stdout.write(f"diffusers: step {step + 1} of {size.updates}, loss {loss.item():.4f}\n")
            sys.stdout.flush()
    average.copy_to(unet.parameters())
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    saved.unlink(missing_ok=True)


@final
@dataclass(frozen=True)
class Row:
    """Distances at one stage: of the student, at its update 0, and of the first teacher in as many steps.

    noise: standard deviation of the difference between the first two."""

    stage: str
    steps: int
    student: Spread
    update_0: Spread
    teacher: Spread
    noise: float


def measure(root: Path, stages: tuple[ChainStage, ...], reader: Reader, *, size: Size) -> list[Row]:
    """A row for each stage that was trained; what was drawn before is kept."""

    def pictures(stage: ChainStage, steps: int) -> list[Pictures]:
        """Of a stage's model, run in `steps` steps; from noise that is the same for all."""
        repeats, count = (size.repeats, size.images) if steps <= FEW_STEPS else (1, min(size.images, MANY_STEPS_IMAGES))

        def draw(repeat: int) -> Pictures:
            # a stock DDPMPipeline says ancestral of itself
            return draw_images(load_source(stage.run_dir), steps=steps, seed=repeat * 10_000, count=count, sampler="ddim")

        paths = [root / "pictures" / f"{stage.name}_in_{steps}_{repeat}.npy" for repeat in range(repeats)]
        return [kept(path, lambda repeat=repeat: draw(repeat)) for repeat, path in enumerate(paths)]

    rows = []
    for before, stage in pairwise(stages):
        drawn = [pictures(each, stage.steps) for each in (stage, before, stages[0])]
        spreads = (Spread.of([reader.distance(repeat, STYLE) for repeat in repeats]) for repeats in drawn)
        noise = reader.noise_of_difference(torch.cat(drawn[0]), torch.cat(drawn[1]), STYLE)
        row = Row(stage.name, stage.steps, *spreads, noise=round(noise, 3))
        sys.stdout.write(f"{row.stage}: student {row.student}, at update 0 {row.update_0}, teacher in as few {row.teacher}\n")
        sys.stdout.flush()
        rows.append(row)
    return rows


def write(rows: list[Row], out: Path, *, size: Size) -> None:
    """The figures, their table and the plot."""
    out.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "command": "python benchmarks/diffusers_teacher.py",
        "commit": commit(),
        "machine": machine(),
        "size": asdict(size),
        "rows": [asdict(row) for row in rows],
    }
    lines = [
        "| sampling steps | student | student at update 0 | student less update 0, and its noise | teacher in as many DDIM steps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        gained = f"{row.student.mean - row.update_0.mean:+.1f} +- {row.noise:.1f}"
        lines.append(f"| {_title(row, rows)} | {row.student} | {row.update_0} | {gained} | {row.teacher} |")
    curves: Mapping[str, list[Spread]] = {
        "student": [row.student for row in rows],
        "student at update 0": [row.update_0 for row in rows],
        "teacher in as many steps": [row.teacher for row in rows],
    }
    plot = line_plot(
        "Frechet distance to held-out faces",
        [_title(row, rows) for row in rows],
        [Line(name, [spread.values for spread in spreads], colour=number) for number, (name, spreads) in enumerate(curves.items())],
        x_label="sampling steps",
        y_label="squared feature units",
    )
    replace_file(out, json_text(result))
    replace_file(out.with_suffix(".md"), "\n".join(lines) + "\n")
    replace_file(out.with_suffix(".png"), png(plot))
    sys.stdout.write("\n".join(lines) + "\n")


def _title(row: Row, rows: list[Row]) -> str:
    """A stage's steps; of a change of the head with a word more."""
    number = rows.index(row)
    return f"{row.steps}, v" if number and rows[number - 1].steps == row.steps else str(row.steps)


if __name__ == "__main__":
    sys.exit(main())
