"""Masks beside images: packed, read and verified with them, and brought to the same place as they are."""

import io
import math
import tarfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn.functional import max_pool2d

from data_shards.images import DecodeError, mask_pixels
from data_shards.index import ShardIndex, index_text
from data_shards.packing.pack import pack
from data_shards.packing.write import PackedSample, write_shard
from data_shards.reading.decode import fitted_images, fitted_masks
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader, read_all
from data_shards.reading.sample import BadSampleError
from data_shards.sources.folder import FolderSource
from data_shards.sources.foreign_tars import ForeignTarSource
from data_shards.sources.rows import Row, UnreadableRow
from data_shards.tars.index_tars import index_tars
from data_shards.tars.verify import verify

ORIENTATION = 0x0112


def encoded(image: Image.Image, name: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def scene(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """Black with a white box, whose last two sides are outside: an image whose mask is the image itself."""
    image = Image.new("RGB", size)
    image.paste("white", box)
    return image


def shards(folder: Path, samples: list[dict[str, bytes]], *, image_size: int) -> ShardIndex:
    with (folder / "s.tar").open("wb") as file:
        shard = write_shard(file, "s.tar", [PackedSample(f"k{at}", tuple(sample.items())) for at, sample in enumerate(samples)])
    (folder / "index.json").write_text(index_text(image_size=image_size, licence={}, source={}, pack={}, shards=[shard]))
    return ShardIndex.load(folder)


def white(images: Tensor) -> Tensor:
    """Where an image is white."""
    return (images[:, :1] >= 128).to(torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three images, two with masks, and a picture that only looks like a mask."""
    root = tmp_path / "mine"
    (root / "cats").mkdir(parents=True)
    for name, size, box in (("a.png", (60, 40), (10, 8, 40, 30)), ("cats/b.JPG", (40, 90), (4, 30, 30, 62))):
        scene(size, box).save(root / name, "JPEG" if name.endswith("JPG") else "PNG", quality=95)
        scene(size, box).convert("L").save(root / f"{name[:-4]}.mask.png")
    Image.new("RGB", (33, 33), "green").save(root / "c.webp")
    Image.new("RGB", (33, 33), "red").save(root / "lonely.mask.png")
    (root / "a.txt").write_text("a box")
    return root


@pytest.mark.parametrize("workers", [0, 1])
def test_a_micro_batch_holds_the_masks_of_its_images(tmp_path: Path, workers: int) -> None:
    boxes = [(1, 2, 9, 12), (0, 0, 4, 16), (5, 5, 6, 6), (0, 0, 16, 16)]
    samples = [{"png": encoded(scene((16, 16), box)), "mask.png": encoded(scene((16, 16), box).convert("1"))} for box in boxes]
    index = shards(tmp_path, samples, image_size=16)
    batches = MicroBatches(index, Plan(index.samples_per_shard, 0, 4, 2), fields=("image", "mask.png"))
    for batch in loader(batches, start_step=0, stop_step=2, indices=range(2), workers=workers):
        mask = batch.tensors["mask.png"]
        assert mask.dtype == torch.uint8 and mask.shape == (2, 1, 16, 16) and torch.equal(mask, white(batch.images))
    assert read_all(index, ("mask.png",)).tensors["mask.png"].flatten(1).sum(1).tolist() == [80, 64, 1, 256]
    assert verify(tmp_path) == []


@settings(max_examples=60, deadline=None)
@given(stored=st.tuples(st.integers(12, 90), st.integers(12, 90)), size=st.tuples(st.integers(8, 64), st.integers(8, 64)), at=st.data())
def test_a_mask_is_brought_to_where_its_image_is(stored: tuple[int, int], size: tuple[int, int], at: st.DataObject) -> None:
    scale = max(size[0] / stored[0], size[1] / stored[1])
    least = min(*stored, math.ceil(max(3, 3 / scale)))  # three pixels of either
    left, top = at.draw(st.integers(0, stored[0] - least)), at.draw(st.integers(0, stored[1] - least))
    right, bottom = at.draw(st.integers(left + least, stored[0])), at.draw(st.integers(top + least, stored[1]))
    image = scene(stored, (left, top, right, bottom))
    images = fitted_images([(image.tobytes(), stored)], size=size)
    masks = fitted_masks([(image.convert("L").tobytes(), stored)], size=size)
    assert masks.shape == (1, 1, size[1], size[0]) and int(masks.max()) <= 1
    # An edge between two pixels may fall to either side.
    inner, outer = -max_pool2d(-masks.float(), 3, 1, 1), max_pool2d(masks.float(), 3, 1, 1)
    assert bool((white(images) >= inner).all()), "white inside the mask"
    assert bool((white(images) <= outer).all()), "black outside of it"


def test_a_folders_masks_are_packed_with_their_images(folder: Path, tmp_path: Path) -> None:
    source = FolderSource.scan(folder)
    assert source.files == ("a.png", "c.webp", "cats/b.JPG", "lonely.mask.png") and set(source.masks) == {"a.png", "cats/b.JPG"}
    index = pack(source, tmp_path / "out", size=20)
    assert verify(tmp_path / "out") == []
    assert sorted(index.shards[0].members) == ["json", "mask.png", "png", "txt"]
    assert [size >= 0 for size in index.shards[0].members["mask.png"].sizes] == [True, False, True, False]
    reader = MicroBatches(index, Plan(index.samples_per_shard, 0, 1, 1), fields=("image", "mask.png"), on_bad_sample="skip")
    seen = {batch.keys[0]: batch for batch in (reader[step, 0] for step in range(8))}
    assert sorted(seen) == ["00000000", "00000002"], "others have no mask, and are skipped where that is allowed"
    for batch in seen.values():
        differ = (batch.tensors["mask.png"] != white(batch.images)).float().mean().item()
        assert differ < 0.06, "but for the rim of the box"
    with pytest.raises(BadSampleError, match=r"it has no mask\.png"):
        MicroBatches(index, Plan(index.samples_per_shard, 0, 4, 4), fields=("mask.png",))[0, 0]


def test_images_and_their_masks_keep_their_own_size_and_orientation(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    upright = scene((30, 50), (3, 5, 20, 11))
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # stored on its side: turn by 90 degrees clockwise to see it upright
    upright.transpose(Image.Transpose.ROTATE_90).save(root / "a.jpg", exif=exif, quality=100, subsampling=0)
    upright.convert("L").save(root / "a.mask.png")
    index = pack(FolderSource.scan(root), tmp_path / "out", size=None, crop="none", max_size=24)
    assert index.size_at(index.shards[0], 0) == (24, 40) and verify(tmp_path / "out") == []
    batch = MicroBatches(index, Plan((1,), 0, 1, 1), fields=("image", "mask.png"), sizes=[(24, 40)])[0, 0]
    assert (batch.tensors["mask.png"] != white(batch.images)).sum() <= 2 * (14 + 5)
    assert batch.tensors["mask.png"].sum() == pytest.approx(17 * 6 * 0.8**2, rel=0.2)


def test_a_pack_knows_its_masks_again(folder: Path) -> None:
    before = FolderSource.scan(folder).describe()
    scene((60, 40), (0, 0, 1, 1)).save(folder / "a.mask.png")
    after = FolderSource.scan(folder).describe()
    assert before["masks_sha256"] != after["masks_sha256"] and before["listing_sha256"] == after["listing_sha256"]
    for mask in folder.rglob("*.mask.png"):
        mask.unlink()
    assert "masks_sha256" not in FolderSource.scan(folder).describe()


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (Image.new("L", (20, 10)), "its mask is 20 x 10 pixels, wanted 60 x 40 as the image"),
        (Image.new("RGBA", (60, 40), (255, 255, 255, 0)), "partly transparent, wanted white where it is to be painted, on black"),
        (Image.new("L", (60, 40), 1), "brightest grey is 1 of 255"),
    ],
)
def test_a_mask_that_may_mean_anything_is_not_packed(folder: Path, mask: Image.Image, reason: str) -> None:
    mask.save(folder / "a.mask.png")
    with pytest.raises(ValueError, match=reason):
        pack(FolderSource.scan(folder), folder.parent / "out", size=20)


def test_a_file_that_is_no_mask_is_named_before_anything_is_packed(folder: Path) -> None:
    (folder / "a.mask.png").write_text("no")
    with pytest.raises(ValueError, match=r"a\.mask\.png: not a JPEG, PNG or WebP image"):
        FolderSource.scan(folder)


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "P", "LA", "RGBA", "I;16"])
def test_masks_of_any_mode_mean_white(mode: str) -> None:
    drawn = Image.new("L", (12, 8))
    ImageDraw.Draw(drawn).rectangle((2, 1, 6, 5), fill=200)
    drawn.putpixel((9, 6), 127)
    if mode == "I;16":
        drawn = Image.frombytes("I;16", drawn.size, b"".join(bytes([0, value]) for value in drawn.tobytes()))
    else:
        drawn = drawn.point([0] * 127 + [127] + [255] * 128).convert(mode) if mode != "1" else drawn.point([0] * 128 + [255] * 128, "1")
    pixels = mask_pixels(encoded(drawn), size=(12, 8))
    assert set(pixels) == {0, 255} and pixels.count(255) == 25 and pixels[12 * 1 + 2] == 255


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (encoded(Image.new("L", (8, 12))), "the mask is 8 x 12 pixels, its image 12 x 8"),
        (encoded(Image.new("LA", (12, 8), (255, 9))), "partly transparent"),
        (encoded(Image.new("L", (12, 8), 1)), "brightest grey is 1"),
        (encoded(Image.new("L", (12, 8)))[:45], "can't be used"),
        (encoded(Image.new("L", (12, 8)), "JPEG"), "can't be used"),
    ],
)
def test_masks_that_can_not_be_used_are_named(content: bytes, reason: str) -> None:
    with pytest.raises(DecodeError, match=reason):
        mask_pixels(content, size=(12, 8))


def test_a_mask_of_another_size_is_found_when_read_and_when_verified(tmp_path: Path) -> None:
    sample = {"png": encoded(scene((16, 16), (0, 0, 8, 8))), "mask.png": encoded(Image.new("L", (16, 8)))}
    index = shards(tmp_path, [sample], image_size=16)
    with pytest.raises(BadSampleError, match="sample 'k0' at byte 512: the mask is 16 x 8 pixels, its image 16 x 16"):
        MicroBatches(index, Plan((1,), 0, 1, 1), fields=("mask.png",))[0, 0]
    (problem,) = verify(tmp_path)
    assert (
        "k0.mask.png: the mask is 16 x 8 pixels" in problem.what and problem.wanted == "a whole mask in black and white of 16 x 16 pixels"
    )


def test_shards_without_masks_say_how_to_get_some(packed: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no mask\.png; pack images that have a NAME\.mask\.png beside them"):
        MicroBatches(ShardIndex.load(packed), Plan((12, 12, 6), 0, 1, 1), fields=("mask.png",))


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_tars_of_others_bring_their_masks(tmp_path: Path) -> None:
    image = scene((24, 24), (2, 4, 20, 10))
    mask = encoded(image.convert("L"))
    write_tar(tmp_path / "t.tar", {"a.mask.png": mask, "a.png": encoded(image), "b.mask.png": mask})
    source = ForeignTarSource.open([str(tmp_path / "t.tar")])
    rows = [row for part in source.parts(10) for row in source.read(part, None)]
    assert isinstance(rows[0], Row) and rows[0].mask == mask and rows[0].image == encoded(image)
    assert isinstance(rows[1], UnreadableRow) and "no image among its members" in rows[1].reason
    write_tar(tmp_path / "t.tar", {"a.mask.png": mask, "a.png": encoded(image)})
    packed = pack(ForeignTarSource.open([str(tmp_path / "t.tar")]), tmp_path / "out", size=24)
    where_they_lie = index_tars([str(tmp_path / "t.tar")], out=tmp_path / "index").index
    for index in (packed, where_they_lie):
        batch = MicroBatches(index, Plan((1,), 0, 1, 1), fields=("image", "mask.png"), sizes=[(24, 24)])[0, 0]
        assert torch.equal(batch.tensors["mask.png"], white(batch.images)) and batch.tensors["mask.png"].sum() == 18 * 6
