"""Which rows are packed: filters, duplicates and bad rows are counted, whoever packs; a full disk and a killed worker lose nothing."""

import errno
import io
import json
import logging
import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from PIL import Image

from data_shards.index import ShardIndex
from data_shards.packing.filters import Filters
from data_shards.packing.pack import PARTIAL_NAME, pack
from data_shards.sources.faces import FacesSource
from data_shards.sources.folder import FolderSource
from data_shards.sources.rows import Part, Row, UnreadableRow, even_parts
from data_shards.tars.verify import verify


def png(width: int, height: int, colour: tuple[int, int, int] | str = "red", name: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, name, lossless=True)
    return file.getvalue()


def row(number: int, image: bytes, caption: str | None = "a field") -> Row:
    return Row(f"{number:04d}", image, caption, where=f"row {number}")


@dataclass(frozen=True)
class Rows:
    """Rows in a list."""

    rows: Sequence[Row | UnreadableRow]
    known: bool = True
    fails_at: int | None = None
    read_parts: list[Part] = field(default_factory=list)

    @property
    def count(self) -> int | None:
        return len(self.rows) if self.known else None

    def describe(self) -> dict[str, object]:
        return {"kind": "rows", "count": len(self.rows)}

    def licence(self) -> dict[str, object]:
        return {"name": "CC0-1.0"}

    def parts(self, rows: int) -> Sequence[Part]:
        return even_parts(len(self.rows), rows) if self.known else [Part(0, 0, None)]

    def read(self, part: Part, size: int | None) -> Iterator[Row | UnreadableRow]:
        self.read_parts.append(part)
        end = len(self.rows) if part.count is None else part.first + part.count
        for number in range(part.first, end):
            if number == self.fails_at:
                raise ValueError("rows.bin: can't be read; fetch it again")
            yield self.rows[number]


def keys(index: ShardIndex) -> list[str]:
    return sorted(key for shard in index.shards for key in shard.keys)


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_filters_leave_out_rows_and_the_index_says_how_many_and_why(tmp_path: Path) -> None:
    source = Rows(
        [
            row(0, png(40, 40)),
            row(1, png(40, 19)),
            row(2, png(20, 61)),
            row(3, png(40, 40), None),
            row(4, png(40, 40), "ab"),
            row(5, png(40, 40), "a" * 31),
            row(6, png(20, 60)),
            row(7, png(20, 20), "   "),
        ]
    )
    filters = Filters(min_size=20, max_aspect_ratio=3, min_caption=3, max_caption=30, require_caption=True)
    index = pack(source, tmp_path / "out", size=8, filters=filters, part_rows=3)
    assert keys(index) == ["0000", "0006"]
    assert index.pack["dropped"] == {"caption_too_long": 1, "caption_too_short": 1, "no_caption": 2, "too_long_a_shape": 1, "too_small": 1}
    assert index.pack["filters"] == {
        "min_size": 20,
        "max_aspect_ratio": 3,
        "min_caption": 3,
        "max_caption": 30,
        "require_caption": True,
    }
    assert pack(source, tmp_path / "out", size=8, filters=filters).sha256 == index.sha256  # finished: what was dropped is no other pack
    with pytest.raises(ValueError, match="holds other shards"):
        pack(source, tmp_path / "out", size=8, filters=replace(filters, min_size=21))


@pytest.mark.parametrize(("dedupe", "expected"), [("off", 5), ("bytes", 4), ("pixels", 2)])
def test_of_equal_rows_the_first_is_packed(dedupe: str, expected: int, tmp_path: Path) -> None:
    red = png(30, 30)
    source = Rows([row(0, png(9, 9, "blue")), row(1, red), row(2, png(30, 30, name="WEBP")), row(3, red, "other"), row(4, png(60, 60))])
    index = pack(source, tmp_path, size=8, dedupe=dedupe, part_rows=2)  # type: ignore[arg-type]
    assert len(keys(index)) == expected and {"0000", "0001"} <= set(keys(index))
    assert index.pack.get("dropped") == ({"duplicate": 5 - expected} if expected < 5 else None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 files of 8 pictures, so that every part holds some that others hold too; one is broken."""
    root = tmp_path_factory.mktemp("folder")
    for number in range(40):
        (root / f"{number:02d}.png").write_bytes(png(20 + number % 8, 20, (number % 8 * 30, 0, 0)))
    (root / "13.png").write_bytes(png(20, 20)[:-30])
    return root


def test_duplicates_are_the_same_for_any_number_of_workers_and_any_parts(folder: Path, tmp_path: Path) -> None:
    source = FolderSource.scan(folder)
    for name, workers, part_rows in (("one", 1, 40), ("two", 2, 7)):
        index = pack(
            source,
            tmp_path / name,
            size=None,
            dedupe="pixels",
            skip_bad_rows=True,
            samples_per_shard=3,
            workers=workers,
            part_rows=part_rows,
        )
        assert keys(index) == [f"{number:08d}" for number in range(8)]
        assert index.pack["dropped"] == {"duplicate": 31, "unreadable": 1}
    assert tars(tmp_path / "one") == tars(tmp_path / "two")


def test_images_of_their_own_size_are_listed_with_it(folder: Path, tmp_path: Path) -> None:
    index = pack(FolderSource.scan(folder), tmp_path, size=None, skip_bad_rows=True, samples_per_shard=10)
    assert index.image_size is None and index.pack["crop"] == "none"
    for shard in index.shards:
        for position, key in enumerate(shard.keys):
            assert index.size_at(shard, position) == (20 + int(key) % 8, 20)
    assert verify(tmp_path) == []


def test_kept_files_stand_in_the_shards_as_they_are(tmp_path: Path) -> None:
    files = [png(30, 20), png(20, 30, name="WEBP"), png(33, 33, name="JPEG")]
    index = pack(Rows([row(number, content) for number, content in enumerate(files)]), tmp_path, size=None, image_format="keep")
    [shard] = index.shards
    assert sorted(shard.members) == ["jpg", "json", "png", "txt", "webp"]
    tar = (tmp_path / shard.name).read_bytes()
    assert all(content in tar for content in files) and verify(tmp_path) == []


def test_bad_rows_stop_the_pack_and_are_named(tmp_path: Path) -> None:
    rows = [row(number, png(9, 9) if number % 3 else b"no") for number in range(90)]
    with pytest.raises(ValueError, match=r"^30 rows can't be packed; mend or remove them, or go on without such") as error:
        pack(Rows(rows), tmp_path, size=8)
    assert str(error.value).count("not a JPEG, PNG or WebP image") == 20 and "row 57: can't" in str(error.value)
    assert str(error.value).endswith("... and 10 more") and not (tmp_path / "index.json").exists()


def test_bad_rows_are_skipped_counted_and_named_in_the_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [row(0, png(9, 9)), UnreadableRow("0001", "it has no image", "table: row 1"), row(2, b"no"), row(3, png(9, 9), "\ud800")]
    with caplog.at_level(logging.WARNING):
        index = pack(Rows(rows), tmp_path, size=8, skip_bad_rows=True)
    assert keys(index) == ["0000"] and index.pack["dropped"] == {"unreadable": 3}
    assert "table: row 1: it has no image" in caplog.text and "row 2: can't be decoded (not a JPEG" in caplog.text


def test_after_bad_rows_the_pack_goes_on_with_those_skipped(tmp_path: Path) -> None:
    rows = [row(number, png(9, 9) if number != 25 else b"no") for number in range(30)]
    with pytest.raises(ValueError, match="row 25"):
        pack(Rows(rows), tmp_path, size=8, part_rows=10)
    again = Rows(rows)
    assert len(keys(pack(again, tmp_path, size=8, part_rows=10, skip_bad_rows=True))) == 29
    assert again.read_parts == [Part(0, 20, 10)]


def test_too_long_captions_and_attributes_are_bad_rows(tmp_path: Path) -> None:
    rows = [row(0, png(9, 9)), row(1, png(9, 9), "a" * 70_000), Row("0002", png(9, 9), extra={"note": "a" * 2_000_000})]
    index = pack(Rows(rows), tmp_path, size=8, skip_bad_rows=True)
    assert keys(index) == ["0000"]


def test_a_part_that_cannot_be_read_stops_even_where_bad_rows_are_skipped(tmp_path: Path) -> None:
    rows = [row(number, png(9, 9)) for number in range(30)]
    with pytest.raises(ValueError, match=r"rows\.bin: can't be read"):
        pack(Rows(rows, fails_at=12), tmp_path, size=8, part_rows=10, skip_bad_rows=True)
    again = Rows(rows)
    assert len(keys(pack(again, tmp_path, size=8, part_rows=10, skip_bad_rows=True))) == 30
    assert again.read_parts == [Part(0, 10, 10), Part(0, 20, 10)]


def test_nothing_left_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no row is left to pack \(too_small 2\); loosen the filters"):
        pack(Rows([row(0, png(9, 9)), row(1, png(9, 9))]), tmp_path, size=8, filters=Filters(min_size=10))


@pytest.mark.parametrize("part_rows", [1, 2])
def test_two_rows_of_one_key_are_an_error(part_rows: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two rows are called '0000'"):
        pack(Rows([row(0, png(9, 9)), row(0, png(9, 9))]), tmp_path, size=8, part_rows=part_rows)


def test_rows_that_nobody_counted_are_packed_too(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    index = pack(
        Rows([row(number, png(9, 9)) for number in range(5)], known=False), tmp_path, size=8, progress=lambda *now: seen.append(now)
    )
    assert len(keys(index)) == 5 and ("reading", 5, None) in seen and seen[-1] == ("writing", 5, 5)


@pytest.mark.parametrize("known", [True, False])
def test_only_the_first_rows_are_read(known: bool, tmp_path: Path) -> None:
    source = Rows([row(number, png(9, 9)) for number in range(30)], known=known)
    index = pack(source, tmp_path, size=8, first_rows=13, part_rows=10)
    assert keys(index) == [f"{number:04d}" for number in range(13)] and index.pack["first_rows"] == 13
    assert sum(part.count or 0 for part in source.read_parts) == 13


def test_the_json_of_a_row_holds_all_that_is_known_of_it(tmp_path: Path) -> None:
    source = Rows([Row("a", png(9, 9), "a cat", {"label": "cat"}, {"file": "x.png"})])
    [shard] = pack(source, tmp_path, size=8).shards
    members = shard.members["json"]
    content = (tmp_path / shard.name).read_bytes()[members.offsets[0] :][: members.sizes[0]]
    assert json.loads(content) == {"attributes": {"label": "cat"}, "caption": "a cat", "file": "x.png"}


def test_a_full_disk_is_named_and_the_pack_goes_on_when_there_is_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("data_shards.packing.pieces.temporary_name", lambda _path: Path("/dev/full"))
        with pytest.raises(OSError, match=r"No space left on device; packing needs room.*it goes on.*out'") as error:
            pack(FacesSource("open-peeps", 12), out, size=16)
    assert error.value.errno == errno.ENOSPC
    with monkeypatch.context() as patch:
        patch.setattr("data_shards.packing.assemble.temporary_name", lambda _path: Path("/dev/full"))
        with pytest.raises(OSError, match="No space left"):
            pack(FacesSource("open-peeps", 12), out, size=16)
    assert pack(FacesSource("open-peeps", 12), out, size=16).samples == 12


def test_a_worker_that_is_killed_is_an_error_and_the_pack_goes_on_with_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    def kill(_pass: str, done: int, _total: int | None) -> None:
        if done >= 8:
            for child in multiprocessing.active_children():
                child.kill()

    faces = FacesSource("open-peeps", 30)
    with pytest.raises(RuntimeError, match=r"was killed.*run the same command again to go on, with fewer --workers"):
        pack(faces, tmp_path, size=16, samples_per_shard=12, workers=2, part_rows=4, progress=kill)
    assert (tmp_path / PARTIAL_NAME).exists()
    pack(faces, tmp_path, size=16, samples_per_shard=12, part_rows=4)
    assert tars(tmp_path) == tars(packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_size": 0}, "min_size=0 must be"),
        ({"max_aspect_ratio": 0.5}, "max_aspect"),
        ({"min_caption": 3, "max_caption": 2}, "no caption can"),
    ],
)
def test_filters_that_nothing_can_meet_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Filters(**options)  # type: ignore[arg-type]
