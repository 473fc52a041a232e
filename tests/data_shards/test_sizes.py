"""Images of other sizes than they are trained at: scaled while they are decoded, cut to the shape, dealt into buckets."""

import io
from array import array
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_shards.config import ImageFormat
from data_shards.images import encode_image
from data_shards.index import Shard, ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.reading.buckets import bucket_numbers, bucket_sizes
from data_shards.reading.decode import fitted
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader
from data_shards.reading.sample_reader import SampleReader

Size = tuple[int, int]


def picture(size: Size) -> Image.Image:
    """A smooth picture whose left is red, right green, top dark and bottom bright."""
    across, down = np.meshgrid(np.linspace(0, 1, size[0]), np.linspace(0, 1, size[1]))
    return Image.fromarray((255 * np.stack([1 - across, across, down], axis=-1)).round().astype(np.uint8))


def make_index(folder: Path, shards: list[list[Size]], *, image_format: ImageFormat = "png", exif: bytes | None = None) -> ShardIndex:
    folder.mkdir()
    entries: list[Shard] = []
    for number, sizes in enumerate(shards):
        contents = [encoded(size, image_format, exif) for size in sizes]
        with (folder / f"s{number}.tar").open("wb") as file:
            samples = [PackedSample(f"{number}-{at}", ((image_format, content),)) for at, content in enumerate(contents)]
            shard = write_shard(file, f"s{number}.tar", samples)
        entries.append(replace(shard, widths=array("q", [w for w, _ in sizes]), heights=array("q", [h for _, h in sizes])))
    (folder / "index.json").write_text(index_text(image_size=None, licence={}, source={}, pack={}, shards=entries))
    return ShardIndex.load(folder)


def encoded(size: Size, image_format: ImageFormat, exif: bytes | None) -> bytes:
    if exif is None:
        return encode_image(picture(size), image_format)
    file = io.BytesIO()
    picture(size).save(file, "JPEG", quality=95, subsampling=0, exif=exif)
    return file.getvalue()


def reference(size: Size, target: Size) -> np.ndarray:
    """By Pillow: scaled until it covers, the centre cut out."""
    image = picture(size)
    scale = max(target[0] / size[0], target[1] / size[1])
    covering = (max(target[0], round(size[0] * scale)), max(target[1], round(size[1] * scale)))
    resized = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - target[0]) // 2, (covering[1] - target[1]) // 2
    return np.asarray(resized.crop((left, top, left + target[0], top + target[1])), dtype=np.int16)


@pytest.mark.parametrize("image_format", ["png", "webp", "jpg"])
@pytest.mark.parametrize("size", [(64, 64), (100, 64), (64, 201), (512, 384), (33, 47), (16, 24)])
@pytest.mark.parametrize("target", [(32, 32), (40, 24), (24, 40)])
def test_an_image_is_brought_to_the_size_with_its_centre_kept(tmp_path: Path, image_format: ImageFormat, size: Size, target: Size) -> None:
    index = make_index(tmp_path / "one", [[size]], image_format=image_format)
    [image] = SampleReader(index).images([(0, 0)], target)
    assert image.shape == (3, target[1], target[0])
    assert np.abs(image.permute(1, 2, 0).numpy().astype(np.int16) - reference(size, target)).max() <= 6


def test_an_image_of_the_wanted_size_is_not_touched(tmp_path: Path) -> None:
    [image] = SampleReader(make_index(tmp_path / "one", [[(32, 32)]])).images([(0, 0)], (32, 32))
    assert image.permute(1, 2, 0).numpy().tobytes() == picture((32, 32)).tobytes()


def test_what_stands_beside_an_image_does_not_change_it(tmp_path: Path) -> None:
    sizes = [(64, 64), (64, 64), (100, 30), (512, 512), (64, 64)]
    reader = SampleReader(make_index(tmp_path / "some", [sizes], image_format="jpg"))
    together = reader.images([(0, at) for at in range(5)], (32, 32))
    alone = torch.cat([reader.images([(0, at)], (32, 32)) for at in range(5)])
    alike = reader.images([(0, 0), (0, 1), (0, 4)], (32, 32))
    assert torch.equal(together, alone) and torch.equal(together[[0, 1, 4]], alike)


def test_a_photo_that_lies_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    index = make_index(tmp_path / "one", [[(64, 64)]], image_format="jpg", exif=exif.tobytes())
    [image] = SampleReader(index).images([(0, 0)], (32, 32))
    red = image[0].float()
    assert red[0].mean() > red[-1].mean() + 100, "red was on the left, now it is on top"


def test_images_come_channels_last_and_whole() -> None:
    batch = fitted(torch.zeros((2, 3, 20, 30), dtype=torch.uint8), size=(8, 8))
    assert batch.shape == (2, 3, 8, 8) and batch.is_contiguous(memory_format=torch.channels_last)


def test_buckets_are_multiples_within_the_area_and_the_aspect() -> None:
    sizes = bucket_sizes(512, multiple_of=64, max_aspect=2.0)
    assert sizes == [(640, 320), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (320, 640)]
    assert bucket_sizes(32, multiple_of=32, max_aspect=4.0) == [(32, 32)]
    for width, height in bucket_sizes(1024, multiple_of=64, max_aspect=3.0):
        assert width % 64 == height % 64 == 0 and 0.75 * 1024**2 < width * height <= 1024**2 and 1 / 3 <= width / height <= 3


def test_each_image_is_in_the_bucket_nearest_to_its_shape(tmp_path: Path) -> None:
    sizes = bucket_sizes(32, multiple_of=8, max_aspect=2.0)
    index = make_index(tmp_path / "some", [[(64, 64), (640, 64), (64, 640)], [(50, 40), (36, 64)]])
    assert sizes == [(40, 24), (32, 32), (24, 40)]
    assert [numbers.tolist() for numbers in bucket_numbers(index, sizes)] == [[1, 0, 2], [1, 2]]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_micro_batch_of_buckets_has_one_shape(tmp_path: Path, workers: int) -> None:
    shapes: list[Size] = [(48, 48), (80, 40), (40, 80)]
    index = make_index(tmp_path / "some", [[shapes[(at + shard) % 3] for at in range(12)] for shard in range(3)])
    sizes = bucket_sizes(32, multiple_of=8, max_aspect=2.0)
    plan = Plan(index.samples_per_shard, 0, 8, 2, buckets=bucket_numbers(index, sizes))
    batches = MicroBatches(index, plan, sizes=sizes)
    seen: list[str] = []
    steps = plan.steps_per_epoch
    for number, batch in enumerate(loader(batches, start_step=0, stop_step=steps, indices=range(4), workers=workers)):
        width, height = sizes[plan.bucket(*divmod(number, 4))]
        assert batch.images.shape == (2, 3, height, width)
        seen += batch.keys
    assert len(set(seen)) == len(seen) == steps * 8


def test_images_of_several_sizes_want_a_size(tmp_path: Path) -> None:
    index = make_index(tmp_path / "some", [[(64, 64), (60, 64)]])
    with pytest.raises(ValueError, match=r"set data.image_size"):
        SampleReader(index).images([(0, 0)])
