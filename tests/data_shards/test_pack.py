"""Packing: the same bytes whoever packs, nothing lost by an interruption, tars that stock webdataset reads."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from webdataset.compat import WebDataset

from data_shards.config import INDEX_NAME, ImageFormat
from data_shards.faces import FacesSource
from data_shards.index import ShardIndex, ShardIndexError
from data_shards.pack import PARTIAL_NAME, pack
from data_shards.read import read_all
from data_shards.verify import verify

FACES = FacesSource("open-peeps", 30)


class Stop(Exception):
    """Stands for a kill in the middle."""


def packed_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stopping_at(samples: int) -> Callable[[int, int], None]:
    def progress(done: int, _total: int) -> None:
        if done >= samples:
            raise Stop

    return progress


def test_two_workers_write_the_bytes_that_one_writes(packed: Path, tmp_path: Path) -> None:
    pack(FACES, tmp_path / "two", size=16, samples_per_shard=12, workers=2)
    assert packed_bytes(tmp_path / "two") == packed_bytes(packed)


def test_nothing_but_shards_and_the_index_is_left(packed: Path) -> None:
    assert sorted(path.name for path in packed.iterdir()) == [INDEX_NAME, *(f"shard-00000{i}.tar" for i in range(3))]


def test_the_order_is_shuffled_over_all_shards_by_the_seed(packed: Path, tmp_path: Path) -> None:
    other = pack(FACES, tmp_path / "other", size=16, samples_per_shard=12, seed=1)
    keys = [[key for shard in index.shards for key in shard.keys] for index in (ShardIndex.load(packed), other)]
    assert sorted(keys[0]) == sorted(keys[1]) == [f"open-peeps_0_{face:08d}" for face in range(30)]
    assert keys[0] != keys[1] and keys[0] != sorted(keys[0])


def test_an_interrupted_pack_goes_on_and_ends_with_the_same_bytes(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack(FACES, out, size=16, samples_per_shard=12, progress=stopping_at(24))
    assert not (out / INDEX_NAME).exists()
    first = (out / "shard-000000.tar").stat().st_mtime_ns
    seen: list[tuple[int, int]] = []
    pack(FACES, out, size=16, samples_per_shard=12, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (12, 30) and seen[-1] == (30, 30)
    assert (out / "shard-000000.tar").stat().st_mtime_ns == first
    assert packed_bytes(out) == packed_bytes(packed)


def test_a_shard_damaged_during_an_interruption_is_made_again(packed: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(Stop):
        pack(FACES, out, size=16, samples_per_shard=12, progress=stopping_at(30))
    (out / "shard-000000.tar").write_bytes(b"\0" * 10)
    (out / PARTIAL_NAME / "shard-000001.tar.json").write_text("{")
    (out / "shard-000002.tar.tmp").write_bytes(b"half")
    pack(FACES, out, size=16, samples_per_shard=12)
    assert packed_bytes(out) == packed_bytes(packed)


def test_a_finished_pack_is_returned_as_it_is(damaged: Path) -> None:
    seen: list[tuple[int, int]] = []
    before = packed_bytes(damaged)
    index = pack(FACES, damaged, size=16, samples_per_shard=12, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(30, 30)] and packed_bytes(damaged) == before
    assert index.sha256 == ShardIndex.load(damaged).sha256


def test_another_pack_in_the_same_folder_is_refused_with_the_difference(damaged: Path) -> None:
    before = packed_bytes(damaged)
    with pytest.raises(ValueError, match=r"image_size is 16, wanted 24, pack.seed is 0, wanted 5.*another --out"):
        pack(FACES, damaged, size=24, samples_per_shard=12, seed=5)
    assert packed_bytes(damaged) == before


def test_going_on_with_another_pack_is_refused_with_the_difference(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        pack(FACES, tmp_path, size=16, samples_per_shard=12, progress=stopping_at(24))
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
    def second(done: int, _total: int) -> None:
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
        drawn = FacesSource("critters", 5).sample(int(key.rsplit("_", 1)[1]), 16)
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
