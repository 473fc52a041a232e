"""Whether a model draws what it was trained on: the training images nearest to what it draws, in numbers and as a sheet."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Float64, Int64, UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data_shards.index import ShardIndex
from trainer.quality.images import ShardImages
from trainer.quality.manifold import nearest
from trainer.quality.nets import ImageFeatures
from trainer.quality.rows import Divide, here
from trainer.quality.statistics import Reference, reference_name, shard_features

SHOWN_IMAGES = 8
SHOWN_NEIGHBOURS = 5
_TILE, _GAP, _TEXT, _MIDDLE = 96, 6, 16, 18
"""Pixels: a picture, the space between two, a line of text, the space behind the drawn ones."""


@final
@dataclass(frozen=True, eq=False)
class Training:
    """The images that a model was trained on, with their features.

    reference_distance: median distance of reference images, which were not trained on, to their nearest one here."""

    name: str
    images: ShardImages
    features: Float[Tensor, "b d"]
    reference_distance: float


@final
@dataclass(frozen=True, eq=False)
class Neighbours:
    """Distances and numbers of the training images nearest to each drawn one, the nearest first."""

    distances: Float64[Tensor, "b n"]
    numbers: Int64[Tensor, "b n"]

    @property
    def median_distance(self) -> float:
        """Of drawn images to their nearest training image."""
        return float(self.distances[:, 0].median())


def prepare_training(
    index: ShardIndex, net: ImageFeatures, reference: Reference, cache: Path, *, side: int, divide: Divide = here
) -> Training:
    """Features of the training images at `side` pixels, from the cache where they are there, and how near the reference comes to them.

    Raises: ValueError if they are the reference's images. Collective."""
    if reference.name.endswith(f"@sha256:{index.sha256}"):
        raise ValueError(f"--training {index.root} holds the reference's own images; give the shards that the model was trained on")
    features = shard_features(index, net, cache, side=side)
    nearby, _ = nearest(reference.features, features, count=1, divide=divide)
    return Training(reference_name(index), ShardImages(index, side), features, float(nearby[:, 0].median()))


def find_neighbours(features: Float[Tensor, "b d"], training: Training, *, divide: Divide = here) -> Neighbours:
    """Of each drawn image the nearest training images."""
    held = training.features.to(features.device)
    values, numbers = nearest(features, held, count=SHOWN_NEIGHBOURS, divide=divide)
    return Neighbours(values.cpu(), numbers.cpu())


def neighbours_sheet(drawn: UInt8[Tensor, "b 3 h w"], neighbours: Neighbours, training: Training) -> Image.Image:
    """The eight of these drawn images that come nearest to a training image, each with its five nearest and their distances."""
    chosen = neighbours.distances[: len(drawn), 0].argsort(stable=True)[:SHOWN_IMAGES].tolist()
    columns = neighbours.numbers.shape[1]
    width = (columns + 1) * (_TILE + _GAP) + _MIDDLE + _GAP
    sheet = Image.new("RGB", (width, _TEXT + _GAP + len(chosen) * (_TILE + _TEXT + _GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    draw.text((_GAP, 2), "drawn", fill="#1c1b1a", font=font)
    left = _GAP + _TILE + _GAP + _MIDDLE
    draw.text(
        (left, 2),
        f"nearest training images, by distance; median of reference images {training.reference_distance:.3g}",
        fill="#1c1b1a",
        font=font,
    )
    for line, number in enumerate(chosen):
        top = _TEXT + _GAP + line * (_TILE + _TEXT + _GAP)
        sheet.paste(_tile(drawn[number]), (_GAP, top))
        draw.text((_GAP, top + _TILE + 1), f"image {number}", fill="#1c1b1a", font=font)
        found: Sequence[int] = neighbours.numbers[number].tolist()
        for column, image in enumerate(training.images.read(found)):
            place = left + column * (_TILE + _GAP)
            sheet.paste(_tile(image), (place, top))
            draw.text((place, top + _TILE + 1), f"{float(neighbours.distances[number, column]):.3g}", fill="#1c1b1a", font=font)
    return sheet


def _tile(image: UInt8[Tensor, "3 h w"]) -> Image.Image:
    pixels = image.to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.BICUBIC)
