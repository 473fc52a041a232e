"""A user's folder becomes shards: squares of the wanted size, captions beside them, bad files named before packing."""

import io
import json
from pathlib import Path

import pytest
from PIL import Image

from data_shards.index import ShardIndex
from data_shards.packing.fit import Fit, fit_image, open_image
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.folder import FolderSource
from data_shards.tars.verify import verify


def square_image(path: Path, size: int) -> Image.Image:
    content = path.read_bytes()
    fitted = fit_image(open_image(content), Fit(size), content)
    return Image.open(io.BytesIO(fitted.content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four images in three formats, two with captions."""
    root = tmp_path / "mine"
    (root / "cats").mkdir(parents=True)
    Image.new("RGB", (60, 40), "red").save(root / "a.png")
    Image.new("RGB", (40, 90), "green").save(root / "cats" / "b.JPG", "JPEG")
    Image.new("RGBA", (50, 50), (0, 0, 255, 128)).save(root / "cats" / "c.webp", lossless=True)
    Image.new("L", (33, 33), 100).save(root / "d.jpeg")
    (root / "a.txt").write_text(" a red field \n", encoding="utf-8")
    (root / "cats" / "b.txt").write_text("grün", encoding="utf-8")
    (root / "notes.md").write_text("not an image")
    return root


def test_a_folder_is_packed_with_its_captions(folder: Path, tmp_path: Path) -> None:
    index = pack(FolderSource.scan(folder, licence="CC0-1.0"), tmp_path / "out", size=20)
    batch = read_all(index, ("image", "caption"))
    found = dict(zip(batch.keys, zip(batch.captions, batch.images[:, :, 10, 10].tolist(), strict=True), strict=True))
    assert found["00000000"] == ("a red field", [255, 0, 0])
    assert found["00000001"][0] == "grün"
    assert found["00000002"] == (None, [127, 127, 255])  # half blue on white
    assert found["00000003"] == (None, [100, 100, 100])
    assert verify(tmp_path / "out") == []
    assert (index.licence["name"], index.source["name"], index.source["count"]) == ("CC0-1.0", "mine", 4)
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()


def test_the_same_folder_elsewhere_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    here = pack(FolderSource.scan(folder), tmp_path / "here", size=16)
    moved = folder.rename(tmp_path / "other" if (tmp_path / "other").mkdir() else tmp_path / "other" / "mine")
    there = pack(FolderSource.scan(moved), tmp_path / "there", size=16)
    assert ShardIndex.load(there.root).sha256 == here.sha256


def test_the_central_square_is_kept(tmp_path: Path) -> None:
    image = Image.new("RGB", (90, 30), "black")
    image.paste("white", (30, 0, 60, 30))
    image.save(tmp_path / "a.png")
    assert square_image(tmp_path / "a.png", 10).getextrema() == ((255, 255),) * 3


def test_a_photo_on_its_side_is_turned_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (40, 40), "black")
    image.paste("white", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it upright
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    upright = square_image(tmp_path / "a.jpg", 20)
    assert upright.getpixel((17, 10)) == (255, 255, 255) and upright.getpixel((3, 10)) == (0, 0, 0)


def test_every_bad_file_is_named_before_anything_is_packed(folder: Path) -> None:
    (folder / "fake.png").write_text("no")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    Image.new("1", (9_000, 9_000)).save(folder / "large.png")
    (folder / "d.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="4 of 7 images") as error:
        FolderSource.scan(folder)
    text = str(error.value)
    assert "fake.png: not a JPEG, PNG or WebP image" in text
    assert "bomb.png" in text and "decompression bomb" in text
    assert "large.png: 9000 x 9000 pixels" in text
    assert "its caption d.txt is not UTF-8" in text


def test_a_damaged_image_is_named_while_packing(folder: Path, tmp_path: Path) -> None:
    content = (folder / "a.png").read_bytes()
    (folder / "a.png").write_bytes(content[:-30])
    with pytest.raises(ValueError, match=r"a\.png: can't be decoded"):
        pack(FolderSource.scan(folder), tmp_path / "out", size=16)
    assert not (tmp_path / "out" / "index.json").exists()


@pytest.mark.parametrize(("name", "message"), [("missing", "is not a folder"), ("empty", "holds no image; wanted files ending in")])
def test_a_folder_without_images_is_refused(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=message):
        FolderSource.scan(tmp_path / name)


def test_captions_may_stand_in_a_metadata_jsonl_as_datasets_writes_it(folder: Path, tmp_path: Path) -> None:
    before = FolderSource.scan(folder).describe()
    lines = [{"file_name": "a.png", "text": "the file beside goes before"}, {"file_name": "d.jpeg", "caption": " grey ", "year": 1954}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    (folder / "cats" / "metadata.jsonl").write_text('{"file_name": "c.webp", "text": "blue"}\n{"file_name": "b.JPG"}\n')
    source = FolderSource.scan(folder)
    batch = read_all(pack(source, tmp_path / "out", size=8), ("image", "caption"))
    assert dict(zip(batch.keys, batch.captions, strict=True)) == {
        "00000000": "a red field",
        "00000001": "grün",
        "00000002": "blue",
        "00000003": "grey",
    }
    assert source.describe() != before


@pytest.mark.parametrize(("line", "message"), [("{", "not JSON"), ("[]", "no file_name"), ('{"file_name": 3}', "no file_name")])
def test_a_bad_line_of_metadata_is_named(line: str, message: str, folder: Path) -> None:
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png"}\n' + line)
    with pytest.raises(ValueError, match=rf"metadata\.jsonl:2: {message}"):
        FolderSource.scan(folder)


def test_bad_files_may_be_skipped(folder: Path, tmp_path: Path) -> None:
    (folder / "fake.png").write_text("no")
    (folder / "d.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="2 of 5 images can't be packed"):
        FolderSource.scan(folder)
    index = pack(FolderSource.scan(folder, skip_bad=True), tmp_path / "out", size=8, skip_bad_rows=True)
    assert index.samples == 3 and index.pack["dropped"] == {"unreadable": 2}


def test_a_source_that_was_mended_before_anything_was_packed_is_packed(tmp_path: Path) -> None:
    folder, out = tmp_path / "images", tmp_path / "out"
    folder.mkdir()
    Image.effect_noise((64, 64), 100).convert("RGB").save(folder / "good.png")
    (folder / "bad.png").write_bytes((folder / "good.png").read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"bad\.png"):
        pack(FolderSource.scan(folder), out, size=8)
    (folder / "bad.png").unlink()
    assert pack(FolderSource.scan(folder), out, size=8).samples == 1
