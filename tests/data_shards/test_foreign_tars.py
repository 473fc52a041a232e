"""Tars of others are packed anew: keys and texts as WebDataset has them, damage and danger named before anything is packed."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import webdataset
from PIL import Image

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.foreign_tars import ForeignTarSource
from data_shards.sources.rows import Row, UnreadableRow
from data_shards.tars.verify import verify


def image(colour: int, name: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (24, 20), (colour, 0, 0)).save(file, name)
    return file.getvalue()


def write(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def rows_of(source: ForeignTarSource, rows: int = 100) -> list[Row | UnreadableRow]:
    return [row for part in source.parts(rows) for row in source.read(part, None)]


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars of stock webdataset with the same keys in both, as img2dataset writes them."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(2):
        with webdataset.TarWriter(str(folder / f"{number:03d}.tar")) as writer:  # type: ignore[attr-defined]
            for sample in range(9):
                about = {"url": f"https://example.org/{sample}", "width": 24, "caption": "not this"}
                writer.write({"__key__": f"{sample:04d}", "jpg": image(number * 90 + sample * 10), "txt": f"tar {number}", "json": about})
    return folder


def test_tars_of_stock_webdataset_are_packed_with_their_texts(tars: Path, tmp_path: Path) -> None:
    source = ForeignTarSource.open([str(tars / "{000..001}.tar")], licence="CC0-1.0")
    index = pack(source, tmp_path / "out", size=None, image_format="keep", part_rows=4)
    assert index.samples == source.count == 18 and verify(tmp_path / "out") == []
    rows = rows_of(source, 4)
    assert [row.key for row in rows] == [f"{tar:05d}-{n:07d}" for tar in range(2) for n in range(9)]
    assert isinstance(rows[10], Row) and rows[10].caption == "tar 1" and rows[10].image == image(100)
    assert rows[10].extra == {"key": "0001", "tar": "001.tar", "url": "https://example.org/1"}
    assert ForeignTarSource.open([str(tars)], licence="CC0-1.0") == source  # a folder
    assert str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()


def test_two_workers_write_the_bytes_that_one_writes(tars: Path, tmp_path: Path) -> None:
    source = ForeignTarSource.open([str(tars)])
    one = pack(source, tmp_path / "one", size=8, samples_per_shard=7)
    assert one.sha256 == pack(source, tmp_path / "two", size=8, samples_per_shard=7, workers=2, part_rows=4).sha256


def test_our_own_shards_keep_captions_and_attributes_when_they_are_packed_anew(packed: Path, tmp_path: Path) -> None:
    again = pack(ForeignTarSource.open([str(packed)]), tmp_path, size=16)
    one, other = (read_all(index, ("image", "caption", "attributes")) for index in (ShardIndex.load(packed), again))
    texts = [sorted(zip(batch.captions, map(str, batch.attributes), strict=True)) for batch in (one, other)]
    assert texts[0] == texts[1] and len(texts[0]) == 30
    pictures = [{image.numpy().tobytes() for image in batch.images} for batch in (one, other)]
    assert pictures[0] == pictures[1]


def test_images_and_texts_are_found_as_people_name_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tar",
        [
            ("x/a.thumb.png", image(1, "PNG")),
            ("x/a.jpg", image(2)),
            ("x/b.image.png", image(3, "PNG")),
            ("x/b.json", json.dumps({"text": " from json ", "attributes": {"label": "cat", "n": 3}}).encode()),
            ("x/a.caption", b" beside "),
            ("y/a.JPG", image(4)),
            ("y/a.cls", b"3"),
            ("README", b"of the tar"),
            ("c.txt", b"no image"),
            ("d.jpg", image(5)),
            ("d.txt", b"\xff\xfe"),
            ("e.jpg", image(6)),
            ("e.json", b"[]"),
            ("f.jpg", image(7)),
            ("f.jpg", image(8)),
        ],
    )
    rows = rows_of(ForeignTarSource.open([str(path)]))
    good = [row for row in rows if isinstance(row, Row)]
    assert [(row.extra["key"], row.caption, row.attributes) for row in good] == [
        ("x/a", "beside", {}),
        ("x/b", "from json", {"label": "cat"}),
        ("y/a", None, {}),
    ]
    assert good[0].image == image(2)
    bad = [(row.where.rpartition(" ")[2], row.reason) for row in rows if isinstance(row, UnreadableRow)]
    assert [name for name, _ in bad] == ["'c'", "'d'", "'e'", "'f'"]
    assert "no image among its members (.txt)" in bad[0][1] and "utf-8" in bad[1][1] and "not an object" in bad[2][1]
    assert bad[3][1] == "two members .jpg of one key"


def hostile(kind: str) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if kind == "gzip" else "w") as tar:
        info = tarfile.TarInfo("../up.jpg" if kind == "up" else "/root.jpg" if kind == "root" else "a.jpg")
        if kind == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
            tar.addfile(info)
        else:
            info.size = 3
            tar.addfile(info, io.BytesIO(b"abc"))
    content = file.getvalue()
    return content[:700] if kind == "cut" else content if kind != "empty" else bytes(10240)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("up", "leads out of the folder"),
        ("root", "leads out of the folder"),
        ("link", "is a symbolic link, not a regular file"),
        ("gzip", "it is gzip, not tar"),
        ("cut", "is cut"),
        ("empty", "holds no sample"),
    ],
)
def test_a_bad_tar_is_named_before_anything_is_packed(kind: str, message: str, tmp_path: Path, tars: Path) -> None:
    (tars / "002.tar").write_bytes(hostile(kind))
    with pytest.raises(ValueError, match=rf"002\.tar: .*{message}"):
        ForeignTarSource.open([str(tars)])


def test_a_tar_that_changes_while_it_is_packed_is_named(tars: Path, tmp_path: Path) -> None:
    source = ForeignTarSource.open([str(tars)])
    write(tars / "001.tar", [("a.jpg", image(1))])
    with pytest.raises(ValueError, match=r"001\.tar: it was changed since"):
        pack(source, tmp_path / "out", size=8)


def test_what_names_no_local_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="packed from local files; fetch them"):
        ForeignTarSource.open(["https://example.org/a.tar"])
    with pytest.raises(ValueError, match="--source tar wants tars"):
        ForeignTarSource.open([])
    with pytest.raises(ValueError, match="no such file or folder"):
        ForeignTarSource.open([str(tmp_path / "a.tar")])
