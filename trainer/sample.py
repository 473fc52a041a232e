"""Drawing images: from a run, a chain or an export, on as many ranks as there are, and the grid that shows them."""

import io
import logging
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Protocol, final

import numpy as np
import torch
from jaxtyping import Float, Float64, UInt8
from PIL import Image
from torch import Tensor

from data_shards import ranks
from data_shards.derive.request import Precision
from data_shards.files import replace_file
from trainer import stages
from trainer.config_sections import Sampler
from trainer.descriptor import Descriptor
from trainer.diffusion.sampler import draw_noise, sample, sampling_grid
from trainer.models.tiny_unet import Denoiser
from trainer.options import Options, integer, optional_integer, optional_text
from trainer.source import Source, denoiser_on, is_latent, load_source, trained_stages

logger = logging.getLogger(__name__)

DEFAULT_BATCH_SIZE = 64
OTHER_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".webp", ".gif")
SHOWN_PIXELS = 128
"""A grid's images are enlarged by a whole factor to about this side."""


_TOLD_SECONDS = 10


class NoiseLevels(Protocol):
    """What sampling needs to know beside the network; a Source has it, and so has a training task."""

    @property
    def descriptor(self) -> Descriptor: ...

    @property
    def alpha_bar(self) -> Float64[Tensor, " T"]: ...


def sample_job(path: Path, options: Options) -> int:
    """Draw images from `path` and write them: a grid where `out` names a .png, else a folder of a grid and single images.

    options: steps (default: the model's own; of a chain, those of the last student that is trained), images, seed, out, sampler
    (default: the model's own), precision, batch_size; of models that are told what to draw also those of
    trainer.latents.drawing.sample_prompts. Returns the exit code.
    Raises: ValueError for a bad source, step count, image count, sampler or precision. Collective."""
    steps, count = optional_integer(options, "steps"), integer(options, "images", 16)
    seed, batch_size = integer(options, "seed", 0), integer(options, "batch_size", DEFAULT_BATCH_SIZE)
    out, precision = Path(optional_text(options, "out") or "samples.png"), chosen_precision(options)
    if count < 1 or batch_size < 1:
        raise ValueError(f"--images {count} and --batch-size {batch_size} must be at least 1")
    if out.suffix.lower() in OTHER_IMAGE_SUFFIXES:
        raise ValueError(f"--out {out}: grids are written as PNG; give a name that ends in .png, or a folder")
    if is_latent(path):
        from trainer.latents.drawing import sample_prompts

        return sample_prompts(path, options)
    _refuse_prompts(options)
    students = [stage.steps for stage in trained_stages(path)]
    steps = steps or min(students, default=None)
    source, sampler = load_source(path, steps), chosen_sampler(options)
    made_for = source.descriptor.step_count
    steps = steps or made_for
    if steps != made_for and ranks.is_rank_0():
        if students:
            logger.info("%s: has no student of %d steps (but of %s): its teacher draws", path, steps, ", ".join(map(str, students[1:])))
        elif source.descriptor.teacher_sha256 is not None:
            logger.info("%s: was made for %d steps, not for %d", path, made_for, steps)
    started = time.perf_counter()
    images = draw_on_ranks(
        denoiser_on(source.model, ranks.device(), precision=precision),
        source,
        steps=steps,
        seed=seed,
        count=count,
        sampler=sampler,
        batch_size=batch_size,
        on_step=Told(steps * -(-count // (batch_size * ranks.world_size()))),
    )
    seconds = time.perf_counter() - started
    if ranks.is_rank_0():
        written = write_images(out, images)
        sampler = sampler or source.descriptor.sampler
        logger.info("%s: %d images of seed %d in %d %s steps, %.1f seconds", written, count, seed, steps, sampler, seconds)
    return 0


@final
class Told:
    """Says every ten seconds how far a drawing of so many steps, all batches together, has come; for `on_step`."""

    def __init__(self, steps: int) -> None:
        self._total, self._done = steps, 0
        self._began = self._last = time.monotonic()

    def __call__(self, _: int) -> None:
        """One more step is done."""
        self._done, now = self._done + 1, time.monotonic()
        if now - self._last > _TOLD_SECONDS and ranks.is_rank_0():
            self._last, left = now, (now - self._began) * (self._total / self._done - 1)
            logger.info("drawing: step %d of %d, about %d seconds left", self._done, self._total, math.ceil(left))


def _refuse_prompts(options: Options) -> None:
    """For a model of pixels, which has no text, nor a second model beside it."""
    for name in ("base", "decoder", "prior", "lora", "lora_scale"):
        if options.get(name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"{option}: this model draws images of one kind with nothing beside it; leave {option} out")
    if any(options.get(name) for name in options.keys() - {"steps", "images", "seed", "out", "sampler", "precision", "batch_size"}):
        from trainer.prompting.requests import asked, refuse_prompts

        refuse_prompts(asked(options))


def chosen_sampler(options: Options) -> Sampler | None:
    """The sampler that a job's options name; None for the model's own.

    Raises: ValueError for any other name."""
    match optional_text(options, "sampler"):
        case None:
            return None
        case "ddim":
            return "ddim"
        case "ancestral":
            return "ancestral"
        case other:
            raise ValueError(f"--sampler {other} is not known; give ddim or ancestral")


def chosen_precision(options: Options) -> Precision:
    """What a job's options say that a finished model computes in; fp32 where they say nothing.

    Raises: ValueError for any other name."""
    match optional_text(options, "precision"):
        case None | "fp32":
            return "fp32"
        case "bf16":
            return "bf16"
        case other:
            raise ValueError(f"--precision {other} is not known; give fp32 or bf16")


def write_images(out: Path, images: UInt8[Tensor, "b h w c"]) -> Path:
    """Write a grid to a .png, or to any other name a folder of grid.png and image_00000.png ...; returns the grid's path.

    Every file is whole or absent."""
    grid = png(grid_image(images, math.ceil(math.sqrt(len(images)))))
    if out.suffix.lower() == ".png" and not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, grid)
        return out
    out.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images.numpy()):
        replace_file(out / f"image_{number:05d}.png", png(Image.fromarray(image.squeeze())))
    replace_file(out / "grid.png", grid)
    return out / "grid.png"


def png(image: Image.Image) -> bytes:
    """An image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def sampling_timesteps(descriptor: Descriptor, steps: int) -> tuple[int, ...]:
    """The original times, ascending, at which a model is run to sample in `steps` steps: a sub-grid of its own.

    Raises: ValueError naming the model's own step count if that has fewer levels, or `steps` is below 1."""
    own = descriptor.timesteps
    if not 1 <= steps <= len(own):
        raise ValueError(f"steps={steps} is not possible: this model samples in {len(own)} steps or fewer; give --steps {len(own)}")
    return tuple(own[level] for level in stages.grid(len(own), steps))


def draw_images(
    source: Source,
    *,
    steps: int,
    seed: int,
    count: int,
    start: int = 0,
    sampler: Sampler | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: torch.device | None = None,
    precision: str = "fp32",
) -> UInt8[Tensor, "b h w c"]:
    """Images start ... start + count - 1 of `seed`, in 0 ... 255, on the CPU; image i is drawn from seed + i alone.

    sampler: None for the one that the model was made for. Moves the model to `device` (default: this rank's); precision: of its
    activations, below fp32 of its weights, too.
    Raises: ValueError if the model has fewer than `steps` levels."""
    device = device or ranks.device()
    predict = denoiser_on(source.model, device, precision=precision)
    return draw_share(
        predict, source, steps=steps, seed=seed, indices=range(start, start + count), sampler=sampler, batch_size=batch_size, device=device
    )


def draw_share(
    predict: Denoiser,
    levels: NoiseLevels,
    *,
    steps: int,
    seed: int,
    indices: range,
    sampler: Sampler | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    device: torch.device,
    on_step: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "b h w c"]:
    """The images of `indices`, as draw_images draws them, from a network in evaluation mode on `device`.

    on_step: told of each batch how many steps are done."""
    descriptor = levels.descriptor
    grid = sampling_grid(levels.alpha_bar, sampling_timesteps(descriptor, steps))
    shape = (descriptor.channels, descriptor.image_size, descriptor.image_size)
    images = [torch.empty((0, descriptor.image_size, descriptor.image_size, descriptor.channels), dtype=torch.uint8)]
    for first in range(indices.start, indices.stop, batch_size):
        x_T, generators = draw_noise(seed, min(batch_size, indices.stop - first), shape, start=first)
        with torch.inference_mode():
            x_0 = sample(
                predict,
                x_T.to(device),
                grid,
                prediction=descriptor.prediction_type,
                sampler=sampler or descriptor.sampler,
                variance=descriptor.variance,
                clip=descriptor.clip,
                generators=generators,
                on_step=on_step,
            )
        images.append(to_uint8(x_0.cpu()))
    return torch.cat(images)


def draw_on_ranks(
    predict: Denoiser,
    levels: NoiseLevels,
    *,
    steps: int,
    seed: int,
    count: int,
    sampler: Sampler | None = None,
    batch_size: int = DEFAULT_BATCH_SIZE,
    on_step: Callable[[int], None] | None = None,
) -> UInt8[Tensor, "b h w c"]:
    """Images 0 ... count - 1 of `seed` on every rank, each rank having drawn a contiguous share. Collective.

    on_step: as of draw_share."""
    # Shares differ by one at most. All ranks draw as many images as the longest has: a gather wants equal shapes, and a network
    # that is shared among the ranks wants equally many calls. What a shorter share draws beyond its end is cut again.
    first, longest = ranks.share(count).start, -(-count // ranks.world_size())
    indices = range(first, first + longest)
    drawn = draw_share(
        predict,
        levels,
        steps=steps,
        seed=seed,
        indices=indices,
        sampler=sampler,
        batch_size=batch_size,
        device=ranks.device(),
        on_step=on_step,
    )
    gathered = ranks.all_gather_tensor(drawn.to(ranks.device())).cpu()
    bounds = [count * number // ranks.world_size() for number in range(ranks.world_size() + 1)]
    return torch.cat([part[: last - first] for part, (first, last) in zip(gathered, pairwise(bounds), strict=True)])


def draw_grid(predict: Denoiser, levels: NoiseLevels, *, images: int, steps: int, seed: int) -> Image.Image:
    """A grid of `images` images in the model's own sampler, or in all its levels where those are fewer than `steps`. Collective."""
    drawn = draw_on_ranks(predict, levels, steps=min(steps, levels.descriptor.step_count), seed=seed, count=images)
    return grid_image(drawn, math.ceil(math.sqrt(images)))


def to_uint8(x_0: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b h w c"]:
    """Images in [-1, 1] as bytes, rounded as diffusers' pipelines do."""
    return ((x_0 / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1) * 255).round().to(torch.uint8)


def grid_image(images: UInt8[Tensor, "b h w c"], columns: int, *, shown_pixels: int = SHOWN_PIXELS) -> Image.Image:
    """Images in rows of `columns` on white, small ones enlarged by a whole factor to at most `shown_pixels` a side.

    Raises: ValueError if there is no image or `columns` is below 1."""
    if len(images) == 0 or columns < 1:
        raise ValueError(f"a grid of {len(images)} images in {columns} columns is empty; give at least one of each")
    count, height, width, channels = images.shape
    factor = max(1, shown_pixels // max(height, width))
    gap = max(1, factor // 2)
    rows = -(-count // columns)
    grid = Image.new("RGB", (columns * (width * factor + gap) - gap, rows * (height * factor + gap) - gap), "white")
    for number, image in enumerate(images.numpy()):
        tile = Image.fromarray(np.repeat(image, 3, axis=2) if channels == 1 else image)
        enlarged = tile.resize((width * factor, height * factor), Image.Resampling.BICUBIC)
        row, column = divmod(number, columns)
        grid.paste(enlarged, (column * (width * factor + gap), row * (height * factor + gap)))
    return grid
