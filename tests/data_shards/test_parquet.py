"""Parquet files are packed row by row, whatever their groups: columns chosen or named, labels by name, damage named."""

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_shards.packing.pack import pack
from data_shards.reading.read import read_all
from data_shards.sources.parquet import ParquetSource
from data_shards.sources.rows import Row, UnreadableRow
from data_shards.tars.verify import verify

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(colour: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (12, 10), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write(path: Path, first: int, rows: int, group: int, *, label: bool = True) -> Path:
    """A table as `datasets` pushes it: an image struct, texts, and a ClassLabel."""
    numbers = range(first, first + rows)
    columns = {
        "image": pa.array([{"bytes": png(n), "path": f"folder/{n}.png"} for n in numbers], IMAGE),
        "text": pa.array([f" picture {n} " for n in numbers], pa.string()),
    }
    features: dict[str, object] = {"image": {"_type": "Image"}, "text": {"dtype": "string", "_type": "Value"}}
    if label:
        columns["label"] = pa.array([n % 3 - 1 for n in numbers], pa.int64())
        features["label"] = {"names": ["cat", "dog"], "_type": "ClassLabel"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return [write(tmp_path / "a.parquet", 0, 23, 5), write(tmp_path / "b.parquet", 23, 40, 40)]


def test_every_row_becomes_a_sample_with_its_caption_and_label(files: list[Path], tmp_path: Path) -> None:
    index = pack(ParquetSource.open(files, licence="CC0-1.0"), tmp_path / "out", size=8, part_rows=7)
    batch = read_all(index, ("image", "caption", "attributes"))
    found = dict(zip(batch.keys, zip(batch.captions, batch.attributes, batch.images[:, 0, 4, 4].tolist(), strict=True), strict=True))
    names: dict[int, dict[str, str]] = {0: {}, 1: {"label": "cat"}, 2: {"label": "dog"}}
    assert found == {f"{n:08d}": (f"picture {n}", names[n % 3], n) for n in range(63)}
    assert (index.source["image_column"], index.source["text_column"], index.source["count"]) == ("image", "text", 63)
    assert index.licence["name"] == "CC0-1.0" and str(tmp_path) not in (tmp_path / "out" / "index.json").read_text()
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("rows", [1, 4, 7, 30, 1000])
def test_parts_of_any_size_hold_every_row_once_and_in_order(rows: int, files: list[Path]) -> None:
    source = ParquetSource.open(files)
    parts = source.parts(rows)
    assert [row.key for part in parts for row in source.read(part, None)] == [f"{n:08d}" for n in range(63)]
    assert max(part.count or 0 for part in parts) <= max(3 * rows, 5)
    if rows == 4:  # whole groups of 5 where they are small; the group of 40 in pieces
        assert [(part.file, part.first, part.count) for part in parts[:6]] == [(0, n, 5) for n in (0, 5, 10, 15)] + [(0, 20, 3), (1, 0, 4)]


def test_two_workers_write_the_bytes_that_one_writes(files: list[Path], tmp_path: Path) -> None:
    source = ParquetSource.open(files)
    one = pack(source, tmp_path / "one", size=8, samples_per_shard=20)
    two = pack(source, tmp_path / "two", size=8, samples_per_shard=20, workers=2, part_rows=9)
    assert one.sha256 == two.sha256


def test_columns_may_be_named_and_none_be_taken_for_captions(tmp_path: Path) -> None:
    table = pa.table({"a": [png(1), b"no", None], "b": [png(2)] * 3, "c": ["x", None, ""], "d": [["y", "z"], [], None]})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"no column looks like images; name it with --image-column.*a \(bytes\)"):
        ParquetSource.open([tmp_path / "t.parquet"])
    source = ParquetSource.open([tmp_path / "t.parquet"], image_column="a", text_column="d")
    rows = list(source.read(source.parts(10)[0], None))
    assert [row.caption for row in rows if isinstance(row, Row)] == ["y", None]
    assert [(row.key, row.reason) for row in rows if isinstance(row, UnreadableRow)] == [("00000002", "it has no image")]
    with pytest.raises(ValueError, match=r"row 1: can't be decoded \(not a JPEG"):
        pack(source, tmp_path / "out", size=8)
    assert ParquetSource.open([tmp_path / "t.parquet"], image_column="b", text_column="").columns.text is None
    with pytest.raises(ValueError, match="--image-column e: there is no such column"):
        ParquetSource.open([tmp_path / "t.parquet"], image_column="e")


def test_a_row_whose_image_is_elsewhere_is_not_fetched(tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(1))
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": str(secret)}], IMAGE)}), tmp_path / "t.parquet")
    source = ParquetSource.open([tmp_path / "t.parquet"])
    [row] = source.read(source.parts(10)[0], None)
    assert isinstance(row, UnreadableRow) and "only the path" in row.reason


def test_files_of_other_columns_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a.parquet", 0, 3, 3)
    with pytest.raises(ValueError, match=r"b\.parquet: its label columns differ from those of .*a\.parquet"):
        ParquetSource.open([first, write(tmp_path / "b.parquet", 3, 3, 3, label=False)])


def test_what_is_not_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"a\.parquet: can't be read as Parquet"):
        ParquetSource.open([tmp_path / "a.parquet"])
    with pytest.raises(ValueError, match=r"b\.parquet: can't be read as Parquet"):
        ParquetSource.open([tmp_path / "b.parquet"])
    with pytest.raises(ValueError, match="--source parquet wants files"):
        ParquetSource.open([])


def test_a_damaged_page_is_named_with_its_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", 0, 23, 5)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.parquet: rows 0 to 4 can't be read"):
        pack(ParquetSource.open([path]), tmp_path / "out", size=8, part_rows=5, skip_bad_rows=True)


def test_another_file_is_another_source(tmp_path: Path) -> None:
    one = ParquetSource.open([write(tmp_path / "a.parquet", 0, 9, 9)]).describe()
    assert one == ParquetSource.open([write(tmp_path / "a.parquet", 0, 9, 9)]).describe()
    assert one != ParquetSource.open([write(tmp_path / "a.parquet", 1, 9, 9)]).describe()


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"needs pyarrow; pip install 'halfstep\[hub\]'"):
        ParquetSource.open([tmp_path / "a.parquet"])
