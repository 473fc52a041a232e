"""The pictures that readers are compared on, stored in each reader's own way: the same encoded bytes for all of them."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import final

import datasets
import numpy as np
from PIL import Image

from data_shards.config import ImageFormat
from data_shards.images import encode_image
from data_shards.index import ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.sources.faces import FacesSource

PHOTOS = Path(__file__).parents[1] / "tests" / "data"
SHARDS = 4
NOISE_LEVELS = 2.0  # of 255: an upscaled photo has no fine grain of its own, and without it would be decoded too quickly


@final
@dataclass(frozen=True)
class Case:
    """What is read; side: scaled to this many pixels while it is decoded, None as it is stored."""

    extension: ImageFormat
    stored_side: int
    side: int | None = None

    @property
    def name(self) -> str:
        """As --case wants it, such as jpg-512 or jpg-512-to-64."""
        return f"{self.extension}-{self.stored_side}" + (f"-to-{self.side}" if self.side is not None else "")

    @property
    def read_side(self) -> int:
        """Of the images in a batch, in pixels."""
        return self.stored_side if self.side is None else self.side

    @property
    def batch_size(self) -> int:
        """As recipes have it for images of this size."""
        return 32 if self.read_side <= 64 else 16


@final
@dataclass(frozen=True)
class Stored:
    """One set of images as each reader wants it. contents: the encoded bytes in memory."""

    extension: ImageFormat
    side: int
    index: ShardIndex
    folder: Path
    parquet: tuple[str, ...]
    arrow: Path
    contents: tuple[bytes, ...]


def stored_images(root: Path, extension: ImageFormat, side: int, *, distinct: int, samples: int) -> Stored:
    """Makes `distinct` images of `side` pixels and stores them below `root`, over and over, as `samples` samples."""
    with ProcessPoolExecutor() as pool:
        encoded = list(pool.map(partial(_encoded, side=side, extension=extension), range(distinct)))
    # each in memory of its own, as in a tar: a few images over and over would stay in a core's cache
    contents = tuple(bytes(bytearray(encoded[number % distinct])) for number in range(samples))
    root.mkdir(parents=True)
    folder, arrow = root / "files", root / "arrow"
    folder.mkdir()
    for number, content in enumerate(contents):
        (folder / f"{number:06d}.{extension}").write_bytes(content)
    rows = [{"image": {"bytes": content, "path": None}} for content in contents]
    table = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))
    table.save_to_disk(arrow)
    parquet = tuple(str(root / f"{shard}.parquet") for shard in range(SHARDS))
    for shard, path in enumerate(parquet):
        table.shard(SHARDS, shard, contiguous=True).to_parquet(path)
    return Stored(extension, side, _shards(root / "shards", extension, side, contents), folder, parquet, arrow, contents)


def _shards(root: Path, extension: str, side: int, contents: Sequence[bytes]) -> ShardIndex:
    """The images alone in plain tars with an index, as `halfstep shards pack` lays them out, but shuffled by nobody."""
    root.mkdir()
    shards, size = [], len(contents) // SHARDS
    for shard in range(SHARDS):
        name = f"shard-{shard:06d}.tar"
        samples = [PackedSample(f"{number:08d}", ((extension, contents[number]),)) for number in range(shard * size, (shard + 1) * size)]
        with (root / name).open("wb") as file:
            shards.append(write_shard(file, name, samples))
    (root / "index.json").write_text(index_text(image_size=side, licence={}, source={}, pack={}, shards=shards))
    return ShardIndex.load(root)


def _encoded(number: int, *, side: int, extension: ImageFormat) -> bytes:
    return encode_image(picture(number, side), extension)


def picture(number: int, side: int) -> Image.Image:
    """By turns a rendered face and a piece of a photo, scaled and mirrored at random, with a camera's grain."""
    photos = sorted(PHOTOS.glob("*.jpg"))
    if number % 2 or not photos:
        face = FacesSource("open-peeps", number + 1).row(number, side).image
        assert isinstance(face, Image.Image), "faces are drawn"
        return face
    draw = np.random.default_rng(number)
    with Image.open(photos[number // 2 % len(photos)]) as file:
        photo = file.convert("RGB")
    part = draw.uniform(max(64.0, side / 3), min(photo.size))
    left, top = (draw.uniform(0, length - part) for length in photo.size)
    piece = photo.resize((side, side), Image.Resampling.LANCZOS, box=(left, top, left + part, top + part))
    pixels = np.asarray(piece)[:, :: int(draw.choice((-1, 1)))]
    grain = draw.normal(0.0, NOISE_LEVELS, pixels.shape)
    return Image.fromarray((pixels + grain).round().clip(0, 255).astype(np.uint8))
