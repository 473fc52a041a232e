"""`shards verify` names each damage with place, finding and wish, and touches nothing."""

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_shards.config import INDEX_NAME
from data_shards.index import Shard, ShardIndex, index_text
from data_shards.packing.write import PackedSample, write_shard
from data_shards.tars.tar import end_bytes, member_bytes
from data_shards.tars.verify import Problem, verify


def names_and_bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def verify_only_reads(folder: Path) -> list[Problem]:
    """The findings, after making sure that nothing was written, here or one level up."""
    before = names_and_bytes(folder.parent)
    problems = verify(folder)
    assert names_and_bytes(folder.parent) == before
    for problem in problems:
        assert problem.what and problem.wanted and problem.mend and "\n" not in str(problem)
    return problems


def insert_member(folder: Path, name: str, content: bytes, *, shard: int = 0) -> None:
    """Puts one more member at the end of a shard, behind the index's back."""
    index = ShardIndex.load(folder)
    path = folder / index.shards[shard].name
    last = max(m.offsets[i] + m.sizes[i] for m in index.shards[shard].members.values() for i in range(index.shards[shard].samples))
    kept = path.read_bytes()[: -(-last // 512) * 512]
    info = tarfile.TarInfo(name)
    info.size = len(content)
    written = kept + info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)
    path.write_bytes(written + end_bytes(len(written)))


def reindexed(folder: Path, samples: list[PackedSample]) -> None:
    """Replaces the shards by one with these samples, honestly indexed."""
    shutil.rmtree(folder)
    folder.mkdir()
    with (folder / "shard-000000.tar").open("wb") as file:
        shard = write_shard(file, "shard-000000.tar", samples)
    write_index(folder, shard)


def write_index(folder: Path, shard: Shard) -> None:
    (folder / INDEX_NAME).write_text(index_text(image_size=16, licence={}, source={}, pack={}, shards=[shard]))


def test_whole_shards_have_no_problem(packed: Path) -> None:
    seen: list[tuple[int, int]] = []
    assert verify(packed, progress=lambda done, total: seen.append((done, total))) == []
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_tar_cut_at_a_member_boundary_loses_named_samples(damaged: Path) -> None:
    shard = ShardIndex.load(damaged).shards[0]
    os.truncate(damaged / shard.name, shard.members["png"].offsets[4] - 512)
    problems = verify_only_reads(damaged)
    assert {problem.key for problem in problems if problem.key} == set(shard.keys[4:])
    assert any("without an end marker: it is cut" in problem.what for problem in problems)
    assert any(problem.wanted == f"{shard.size_bytes} bytes" for problem in problems)


def test_a_tar_cut_inside_data_says_which_member_is_cut(damaged: Path) -> None:
    shard = ShardIndex.load(damaged).shards[0]
    os.truncate(damaged / shard.name, shard.members["png"].offsets[4] + 10)
    assert any(f"member '{shard.keys[4]}.png' is cut" in problem.what for problem in verify_only_reads(damaged))


@pytest.mark.parametrize("byte", [0, 100, 124, 148, 156, 257])
def test_a_flipped_header_bit_is_named_with_its_offset(byte: int, damaged: Path, flip_bit: Callable[[int, int], None]) -> None:
    shard = ShardIndex.load(damaged).shards[1]
    header = shard.members["png"].offsets[3] - 512
    flip_bit(1, header + byte)
    problems = verify_only_reads(damaged)
    assert any(problem.offset == header and "checksum" in problem.what for problem in problems)
    assert {problem.key for problem in problems if problem.key} == set(shard.keys[3:])
    assert {problem.shard for problem in problems} == {shard.name}


@pytest.mark.parametrize("extension", ["png", "txt", "json"])
def test_a_flipped_data_bit_is_named_with_its_sample(extension: str, damaged: Path, flip_bit: Callable[[int, int], None]) -> None:
    shard = ShardIndex.load(damaged).shards[2]
    flip_bit(2, shard.members[extension].offsets[1] + 5)
    problems = verify_only_reads(damaged)
    assert [problem.key for problem in problems if problem.key] == [shard.keys[1]]
    assert any("sha256" in problem.what for problem in problems)
    assert any(f"{shard.keys[1]}.{extension}: its bytes were changed" in problem.what for problem in problems)


def test_a_flipped_padding_bit_is_noticed(damaged: Path, flip_bit: Callable[[int, int], None]) -> None:
    flip_bit(0, (damaged / "shard-000000.tar").stat().st_size - 1)
    assert any("bytes that are not zero follow the end marker" in problem.what for problem in verify_only_reads(damaged))


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        ("evil.pyd", "member 'evil.pyd' has a forbidden extension"),
        ("evil.pkl", "has a forbidden extension"),
        ("evil", "has a forbidden extension"),
        ("../evil.png", "member name '../evil.png' leads out of the folder"),
        ("/tmp/evil.png", "leads out of the folder"),
        ("spare.png", "member 'spare.png' is not in the index"),
    ],
)
def test_a_member_that_does_not_belong_is_named(name: str, finding: str, damaged: Path) -> None:
    marker = damaged.parent / "executed"
    insert_member(damaged, name, f"cos\nsystem\n(S'touch {marker}'\ntR.".encode())
    problems = verify_only_reads(damaged)
    assert any(finding in problem.what for problem in problems)
    assert not marker.exists()


def test_a_second_member_of_a_name_is_named(damaged: Path) -> None:
    shard = ShardIndex.load(damaged).shards[0]
    insert_member(damaged, f"{shard.keys[0]}.png", b"other")
    assert any("a second member" in problem.what for problem in verify_only_reads(damaged))


def test_a_huge_png_is_named_and_never_unpacked(damaged: Path) -> None:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    reindexed(damaged, [PackedSample("bomb", (("png", file.getvalue()),))])
    (problem,) = verify_only_reads(damaged)
    assert problem.key == "bomb" and "the image is 20000 x 20000 pixels" in problem.what and "16 x 16" in problem.wanted


def test_an_image_that_is_not_of_its_format_is_named(damaged: Path) -> None:
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "GIF")
    reindexed(damaged, [PackedSample("gif", (("png", file.getvalue()),)), PackedSample("text", (("jpg", b"hello"),))])
    assert [problem.key for problem in verify_only_reads(damaged)] == ["gif", "text"]


@pytest.mark.parametrize("content", [b"", bytes(10240)])
def test_an_empty_shard_is_named(content: bytes, damaged: Path) -> None:
    (damaged / "shard-000001.tar").write_bytes(content)
    problems = verify_only_reads(damaged)
    keys = set(ShardIndex.load(damaged).shards[1].keys)
    assert {problem.key for problem in problems if problem.key} == keys
    assert any("empty shard" in problem.what or "it is cut" in problem.what for problem in problems)


def test_an_indexed_shard_without_samples_is_no_index(damaged: Path) -> None:
    write_index(damaged, Shard("shard-000000.tar", 10240, "", (), {}))
    (problem,) = verify_only_reads(damaged)
    assert problem.shard == INDEX_NAME


def test_missing_and_unlisted_shards_are_named(damaged: Path) -> None:
    (damaged / "shard-000001.tar").rename(damaged / "shard-000009.tar")
    found = {problem.shard: problem.what for problem in verify_only_reads(damaged)}
    assert found == {"shard-000001.tar": "the file is missing", "shard-000009.tar": "a shard that is not in the index"}


def test_a_tar_written_by_others_with_other_bytes_is_told_from_ours(damaged: Path) -> None:
    content = member_bytes("a.png", b"x")
    (damaged / "shard-000002.tar").write_bytes(content + end_bytes(len(content)))
    problems = verify_only_reads(damaged)
    assert any("member 'a.png' is not in the index" in problem.what for problem in problems)
    assert len([problem for problem in problems if problem.key]) == 18  # 6 samples of 3 members
