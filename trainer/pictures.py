"""The same-noise pictures: what each model draws from eight fixed seeds in N steps, drawn once and kept beside the run."""

import io
import json
import logging
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, final

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from data_shards import ranks
from data_shards.files import replace_file
from trainer.chain import read_chain
from trainer.config_sections import Sampler
from trainer.export_folder import is_hub_id
from trainer.manifest import newest_checkpoint
from trainer.models.tiny_unet import Denoiser
from trainer.sample import Told, draw_on_ranks, draw_share
from trainer.source import Source, denoiser_on, load_source
from trainer.stock import is_stock

logger = logging.getLogger(__name__)

Model = Literal["student", "teacher", "previous"]
"""previous: the student of the stage before, run in the next one's steps."""
PICTURES = 8
PICTURES_SEED = 0
MOST_MEASURED_STEPS = 32
"""Above it, unless asked for, no distances are measured (hundreds of images of hundreds of network calls each), and no teacher is cut to
its students' counts: it draws there what it draws in all its steps."""
_FOLDER = "pictures"
_FACTS = "halfstep"
_TITLES: dict[Model, tuple[str, str]] = {
    "student": ("student made for so many steps", "#2f5fd0"),
    "teacher": ("teacher run in so many DDIM steps", "#c2571a"),
}
_TILE, _GAP, _MARGIN, _HEAD, _MIDDLE = 64, 4, 76, 34, 28
"""Pixels in the overview: a picture, the space between two, left and top margins, the space between the two halves."""


@final
@dataclass(frozen=True, eq=False)
class Entry:
    """One row of the report: a model run in so many steps."""

    model: Model
    steps: int
    sampler: Sampler
    source: Source

    @property
    def is_cut(self) -> bool:
        """Whether it is a teacher run in fewer steps than it has noise levels."""
        return self.model == "teacher" and self.steps < self.source.descriptor.step_count


@final
@dataclass(frozen=True, eq=False)
class PictureRow:
    """What an entry draws from the fixed seeds, and the seconds one process took for one of them."""

    model: Model
    steps: int
    sampler: Sampler
    images: UInt8[Tensor, "b h w c"]
    seconds_per_image: float


@final
@dataclass(frozen=True, eq=False)
class Models:
    """The models of a chain, or the one of a RUN_DIR or an export; students are loaded one at a time."""

    path: Path
    teacher: Source | None
    students: Mapping[int, Path]
    """Of each step count, where the student with a checkpoint is."""
    image_size: int

    def entries(self, steps: Iterable[int]) -> Iterator[Entry]:
        """For each step count, most steps first: the teacher run in so many DDIM steps, then the student made for them.

        Raises: ValueError at once if a count is of no model here."""
        counts = sorted(set(steps), reverse=True)
        levels = self.teacher.descriptor.step_count if self.teacher else 0
        strange = [count for count in counts if not 1 <= count <= levels and count not in self.students]
        if strange:
            possible = [str(count) for count in self.students] + ([f"any from 1 to {levels}"] if levels else [])
            raise ValueError(f"{self.path}: no model here samples in {strange[0]} steps; --steps may be {', '.join(possible)}")
        return self._entries(counts, levels)

    def _entries(self, counts: list[int], levels: int) -> Iterator[Entry]:
        for count in counts:
            if self.teacher and count <= levels:
                yield Entry("teacher", count, "ddim", self.teacher)
            if count in self.students:
                student = load_source(self.students[count])
                yield Entry("student", count, student.descriptor.sampler, student)

    def step_counts(self) -> tuple[int, ...]:
        """The counts that the models were made for, most steps first."""
        own = {self.teacher.descriptor.step_count} if self.teacher else set()
        return tuple(sorted(own | self.students.keys(), reverse=True))


def load_models(path: Path) -> Models:
    """What there is to draw from at `path`; stages of a chain without a checkpoint do not count.

    Raises: ValueError if there is no model."""
    if (path / "chain.json").exists():
        first, *others = read_chain(path)
        teacher = load_source(first.run_dir)
        students = {stage.steps: stage.run_dir for stage in others if has_model(stage.run_dir)}
        return Models(path, teacher, students, teacher.descriptor.image_size)
    only = load_source(path)
    if only.descriptor.teacher_sha256 is None:
        return Models(path, only, {}, only.descriptor.image_size)
    return Models(path, None, {only.descriptor.step_count: path}, only.descriptor.image_size)


def has_model(path: Path) -> bool:
    """Whether a run has a checkpoint, or a folder is an export or a stock pipeline, or of the Hub."""
    stock = is_stock(path) or (not path.exists() and is_hub_id(str(path)))
    return stock or (path / "model_index.json").exists() or newest_checkpoint(path) is not None


def picture_row(entry: Entry, home: Path) -> PictureRow:
    """An entry's pictures, read from home/pictures/ or drawn by all ranks together and kept there.

    Raises: PeerLost. Collective."""
    path, facts = _kept(entry, home)
    row = _read(path, entry, facts)
    if ranks.any_rank(row is None):
        row = _draw(entry)
        if ranks.is_rank_0():
            _write(path, row, facts)
        ranks.barrier()
    assert row is not None, "all ranks read the row or all have drawn it"
    return row


def kept_picture_row(entry: Entry, home: Path) -> PictureRow | None:
    """An entry's pictures where they have been drawn already."""
    path, facts = _kept(entry, home)
    return _read(path, entry, facts)


def overview_picture(pictures: Sequence[PictureRow]) -> Image.Image:
    """The rows as one picture: a line a step count, students on the left, the teacher run in so many steps on the right."""
    counts = sorted({picture.steps for picture in pictures}, reverse=True)
    models: list[Model] = [model for model in _TITLES if any(picture.model == model for picture in pictures)]
    block = PICTURES * (_TILE + _GAP) - _GAP
    left = {model: _MARGIN + number * (block + _MIDDLE) for number, model in enumerate(models)}
    sheet = Image.new("RGB", (left[models[-1]] + block + _GAP, _HEAD + len(counts) * (_TILE + _GAP)), "white")
    draw, small, large = ImageDraw.Draw(sheet), ImageFont.load_default(size=16), ImageFont.load_default(size=20)
    for model in models:
        title, colour = _TITLES[model]
        draw.text((left[model], _HEAD / 2), title, fill=colour, font=small, anchor="lm")
    for number, count in enumerate(counts):
        draw.text((_MARGIN - 12, _HEAD + number * (_TILE + _GAP) + _TILE / 2), str(count), fill="#1c1b1a", font=large, anchor="rm")
    for picture in pictures:
        top = _HEAD + counts.index(picture.steps) * (_TILE + _GAP)
        for number, image in enumerate(picture.images.numpy()):
            tile = Image.fromarray(image.squeeze()).convert("RGB").resize((_TILE, _TILE), Image.Resampling.BICUBIC)
            sheet.paste(tile, (left[picture.model] + number * (_TILE + _GAP), top))
    return sheet


def predictor(entry: Entry) -> Denoiser:
    """An entry's network on this rank's device, as a plain function."""
    return denoiser_on(entry.source.model, ranks.device(), precision=entry.source.recipe.engine.precision)


def warm_up(entry: Entry) -> None:
    """One small forward, so that what a process does only once is not measured."""
    predict = predictor(entry)
    draw_share(predict, entry.source, steps=1, seed=PICTURES_SEED, indices=range(1), device=ranks.device())


def rank_seconds_per_image(seconds: float, images: int) -> float:
    """Seconds that all processes took together, over the images they drew. Collective."""
    totals = ranks.all_gather_tensor(
        torch.tensor([seconds if images else 0.0, float(images)], dtype=torch.float64, device=ranks.device())
    ).sum(dim=0)
    return float(totals[0] / totals[1])


def _kept(entry: Entry, home: Path) -> tuple[Path, dict[str, object]]:
    """Where an entry's pictures are kept, and what the file has to say of them to be these."""
    path = home / _FOLDER / f"{entry.model}_{entry.steps:04d}_steps_{entry.source.weights_sha256[:8]}.png"
    precision = entry.source.recipe.engine.precision
    return path, {"weights_sha256": entry.source.weights_sha256, "sampler": entry.sampler, "precision": precision, "seed": PICTURES_SEED}


def _draw(entry: Entry) -> PictureRow:
    logger.info("drawing %d pictures: %s, %d steps", PICTURES, entry.model, entry.steps)
    predict = predictor(entry)
    warm_up(entry)
    started = time.perf_counter()
    images = draw_on_ranks(
        predict, entry.source, steps=entry.steps, seed=PICTURES_SEED, count=PICTURES, sampler=entry.sampler, on_step=Told(entry.steps)
    )
    seconds = time.perf_counter() - started
    mine = len(ranks.share(PICTURES))
    return PictureRow(entry.model, entry.steps, entry.sampler, images, rank_seconds_per_image(seconds, mine))


def _write(path: Path, row: PictureRow, facts: dict[str, object]) -> None:
    """The pictures side by side in one PNG, with what they are in its text chunk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = PngImagePlugin.PngInfo()
    text.add_text(_FACTS, json.dumps({**facts, "seconds_per_image": row.seconds_per_image}))
    strip = np.concatenate(list(row.images.numpy()), axis=1)
    buffer = io.BytesIO()
    Image.fromarray(strip.squeeze()).save(buffer, format="PNG", pnginfo=text)
    replace_file(path, buffer.getvalue())


def _read(path: Path, entry: Entry, facts: dict[str, object]) -> PictureRow | None:
    """The row in a file, or None if there is none, or it is of another model or damaged: it is drawn again."""
    size, channels = entry.source.descriptor.image_size, entry.source.descriptor.channels
    try:
        with Image.open(path, formats=("PNG",)) as strip:
            if strip.size != (PICTURES * size, size):
                return None
            told = json.loads(str(strip.info.get(_FACTS)))
            pixels = torch.from_numpy(np.array(strip)).reshape(size, PICTURES, size, channels).transpose(0, 1).contiguous()
    except (OSError, ValueError, SyntaxError):
        return None
    seconds = told.pop("seconds_per_image", math.nan) if isinstance(told, dict) else math.nan
    if told != facts or not isinstance(seconds, float) or not math.isfinite(seconds):
        return None
    return PictureRow(entry.model, entry.steps, entry.sampler, pixels, seconds)
