"""Packing: the same bytes whoever packs, nothing lost by an interruption, tars that stock webdataset reads."""

import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data_shards.config import INDEX_NAME, ImageFormat
from data_shards.index import ShardIndex, ShardIndexError
from data_shards.packing.pack import PARTIAL_NAME, READING, WRITING, Progress, pack
from data_shards.reading.read import read_all
from data_shards.sources.faces import FacesSource
from data_shards.tars.verify import verify

FACES = FacesSource("open-peeps", 30)


class Stop(Exception):
    """Stands for a kill in the middle."""


def packed_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping_at(name: str, samples: int) -> Progress:
    def progress(now: str, done: int, _total: int | None) -> None:
        if now == name and done >= samples:
            raise Stop

    return progress


def mtimes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.suffix == ".tar"}


def test_two_workers_write_the_bytes_that_one_writes(packed: Path, tmp_path: Path) -> None:
    seen: list[int] = []
    pack(
        FACES,
        tmp_path / "two",
        size=16,
        samples_per_shard=12,
        workers=2,
        part_rows=7,
        progress=lambda _pass, done, _total: seen.append(done),
    )
    assert packed_bytes(tmp_path / "two") == packed_bytes(packed)
    assert seen[-1] == 30


def test_nothing_but_shards_and_the_index_is_left(packed: Path) -> None:
    assert sorted(path.name for path in packed.iterdir()) == [INDEX_NAME, *(f"shard-00000{i}.tar" for i in range(3))]


def test_the_order_is_shuffled_over_all_shards_by_the_seed(packed: Path, tmp_path: Path) -> None:
    other = pack(FACES, tmp_path / "other", size=16, samples_per_shard=12, seed=1)
    keys = [[key for shard in index.shards for key in shard.keys] for index in (ShardIndex.load(packed), other)]
    assert sorted(keys[0]) == sorted(keys[1]) == [f"open-peeps_0_{face:08d}" for face in range(30)]
    assert keys[0] != keys[1] and keys[0] != sorted(keys[0])


def test_a_pack_interrupted_while_reading_goes_on_and_ends_with_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack(FACES, out, size=16, samples_per_shard=12, part_rows=8, progress=stopping_at(READING, 20))
    assert not (out / INDEX_NAME).exists()
    pieces = mtimes(out / PARTIAL_NAME)
    assert sorted(pieces) == ["piece-000000.tar", "piece-000001.tar"]
    seen: list[tuple[str, int, int | None]] = []

    def progress(name: str, done: int, total: int | None) -> None:
        seen.append((name, done, total))
        assert {name: at for name, at in mtimes(out / PARTIAL_NAME).items() if name in pieces} == pieces

    pack(FACES, out, size=16, samples_per_shard=12, part_rows=8, progress=progress)
    assert seen[0] == (READING, 16, 30) and (READING, 30, 30) in seen and seen[-1] == (WRITING, 30, 30)
    assert packed_bytes(out) == packed_bytes(packed)


def test_a_pack_interrupted_while_writing_keeps_the_shards_that_it_wrote(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack(FACES, out, size=16, samples_per_shard=12, part_rows=8, progress=stopping_at(WRITING, 12))
    first = (out / "shard-000000.tar").stat().st_mtime_ns
    seen: list[tuple[str, int, int | None]] = []
    pack(FACES, out, size=16, samples_per_shard=12, part_rows=8, progress=lambda *now: seen.append(now))
    assert [done for name, done, _ in seen if name == READING] == [30]
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first
    assert packed_bytes(out) == packed_bytes(packed)


def test_a_pack_may_go_on_with_parts_of_another_size(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(Stop):
        pack(FACES, tmp_path, size=16, samples_per_shard=12, part_rows=8, progress=stopping_at(READING, 20))
    pack(FACES, tmp_path, size=16, samples_per_shard=12, part_rows=5)
    assert packed_bytes(tmp_path) == packed_bytes(packed)


KILLED = """
import os, signal, sys
from data_shards.sources.faces import FacesSource
from data_shards.packing.pack import pack

def progress(name, done, total):
    if name == sys.argv[2] and done >= int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    pack(FacesSource("open-peeps", 30), sys.argv[1], size=16, samples_per_shard=12, part_rows=4, workers=2, progress=progress)
"""


@pytest.mark.parametrize(("name", "samples"), [(READING, 9), (WRITING, 12)])
def test_a_killed_pack_of_two_workers_goes_on_and_ends_with_the_same_bytes(name: str, samples: int, packed: Path, tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    # the workers hold the other end of the pipe: it closes when they have ended too, so none is left over
    ran = subprocess.run([sys.executable, script, out, name, str(samples)], capture_output=True, timeout=60, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr.decode()
    assert (out / PARTIAL_NAME / "wanted.json").exists() and not (out / INDEX_NAME).exists()
    pack(FACES, out, size=16, samples_per_shard=12, part_rows=4)
    assert packed_bytes(out) == packed_bytes(packed)


def test_what_was_damaged_during_an_interruption_is_made_again(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack(FACES, out, size=16, samples_per_shard=12, part_rows=8, progress=stopping_at(WRITING, 30))
    (out / "shard-000000.tar").write_bytes(b"\0" * 10)
    (out / PARTIAL_NAME / "shard-000001.tar.json").write_text("{")
    (out / "shard-000002.tar.tmp").write_bytes(b"half")
    piece = out / PARTIAL_NAME / "piece-000001.tar"
    piece.write_bytes(bytes([piece.read_bytes()[0] ^ 1, *piece.read_bytes()[1:]]))
    (out / PARTIAL_NAME / "piece-000002.tar.json").write_text("{}")
    pack(FACES, out, size=16, samples_per_shard=12, part_rows=8)
    assert packed_bytes(out) == packed_bytes(packed)


def test_a_piece_that_changes_between_the_passes_is_not_packed(tmp_path: Path) -> None:
    def progress(name: str, done: int, _total: int | None) -> None:
        if (name, done) == (WRITING, 0):
            piece = tmp_path / PARTIAL_NAME / "piece-000000.tar"
            piece.write_bytes(piece.read_bytes().replace(b"open-peeps", b"open-peepz"))

    with pytest.raises(RuntimeError, match=r"piece-000000\.tar: sample 'open-peeps.*was changed since.*run the same command again"):
        pack(FACES, tmp_path, size=16, samples_per_shard=12, progress=progress)


def test_a_finished_pack_is_returned_as_it_is(damaged: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    before = packed_bytes(damaged)
    index = pack(FACES, damaged, size=16, samples_per_shard=12, progress=lambda *now: seen.append(now))
    assert seen == [(WRITING, 30, 30)] and packed_bytes(damaged) == before
    assert index.sha256 == ShardIndex.load(damaged).sha256


def test_another_pack_in_the_same_folder_is_refused_with_the_difference(damaged: Path) -> None:
    before = packed_bytes(damaged)
    with pytest.raises(ValueError, match=r"image_size is 16, wanted 24, pack.seed is 0, wanted 5.*remove that folder"):
        pack(FACES, damaged, size=24, samples_per_shard=12, seed=5)
    assert packed_bytes(damaged) == before


def test_going_on_with_another_pack_is_refused_with_the_difference(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        pack(FACES, tmp_path, size=16, samples_per_shard=12, progress=stopping_at(READING, 24))
    with pytest.raises(ValueError, match=r"beginning of another pack \(source.count is 30, wanted 31\)"):
        pack(FacesSource("open-peeps", 31), tmp_path, size=16, samples_per_shard=12)


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    with pytest.raises(ValueError, match=r"is not empty \(it holds thesis.tex\)"):
        pack(FACES, tmp_path, size=16)
    assert (tmp_path / "thesis.tex").read_text() == "dear"


def test_a_finished_pack_that_lost_a_shard_is_not_taken_for_whole(damaged: Path) -> None:
    (damaged / "shard-000001.tar").unlink()
    with pytest.raises(ShardIndexError, match=r"shard-000001\.tar is missing"):
        pack(FACES, damaged, size=16, samples_per_shard=12)


def test_two_packs_into_one_folder_do_not_mix(tmp_path: Path) -> None:
    def second(_pass: str, done: int, _total: int | None) -> None:
        if done == 12:
            with pytest.raises(RuntimeError, match="being packed by another process"):
                pack(FACES, tmp_path, size=16, samples_per_shard=12)

    pack(FACES, tmp_path, size=16, samples_per_shard=12, progress=second)


@pytest.mark.parametrize(("size", "samples_per_shard", "workers"), [(0, 1, 1), (16, 0, 1), (16, 1, 0)])
def test_sizes_below_one_are_refused(size: int, samples_per_shard: int, workers: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must each be at least 1"):
        pack(FACES, tmp_path, size=size, samples_per_shard=samples_per_shard, workers=workers)


@pytest.mark.parametrize("image_format", ["png", "webp"])
def test_packed_images_are_the_drawn_ones(image_format: ImageFormat, tmp_path: Path) -> None:
    index = pack(FacesSource("critters", 5), tmp_path, size=16, image_format=image_format)
    batch = read_all(index, ("image", "caption", "attributes"))
    for key, image, caption, attributes in zip(batch.keys, batch.images, batch.captions, batch.attributes, strict=True):
        drawn = FacesSource("critters", 5).row(int(key.rsplit("_", 1)[1]), 16)
        assert isinstance(drawn.image, Image.Image)
        assert image.permute(1, 2, 0).contiguous().numpy().tobytes() == drawn.image.tobytes()
        assert (caption, attributes) == (drawn.caption, drawn.attributes)
    assert verify(tmp_path) == []


def test_members_are_ustar_without_time_or_owner(packed: Path) -> None:
    with tarfile.open(packed / "shard-000000.tar", "r:") as tar:
        members = tar.getmembers()
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode, m.type) for m in members} == {(0, 0, 0, "", "", 0o644, tarfile.REGTYPE)}
    assert [m.name.rsplit(".", 1)[1] for m in members[:3]] == ["png", "txt", "json"]


def test_stock_webdataset_reads_the_shards(packed: Path) -> None:
    index = ShardIndex.load(packed)
    urls = [str(packed / shard.name) for shard in index.shards]
    samples = list(WebDataset(urls, shardshuffle=False))
    ours = read_all(index, ("image", "caption", "attributes"))
    assert [sample["__key__"] for sample in samples] == list(ours.keys)
    assert [sample["txt"].decode() for sample in samples] == list(ours.captions)
    assert [json.loads(sample["json"])["attributes"] for sample in samples] == list(ours.attributes)
    for sample, image in zip(samples, ours.images, strict=True):
        assert Image.open(io.BytesIO(sample["png"])).tobytes() == image.permute(1, 2, 0).contiguous().numpy().tobytes()


def test_moved_shards_keep_their_identity(packed: Path, tmp_path: Path) -> None:
    moved = Path(shutil.copytree(packed, tmp_path / "elsewhere"))
    assert ShardIndex.load(moved).sha256 == ShardIndex.load(packed).sha256
