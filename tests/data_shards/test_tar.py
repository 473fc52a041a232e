"""Our tar members are the ones the standard library would write, and the walk over a tar always ends."""

import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_shards.tars.tar import Damage, Member, end_bytes, member_bytes, walk


def tar_of(*contents: tuple[str, bytes]) -> bytes:
    written = b"".join(member_bytes(name, content) for name, content in contents)
    return written + end_bytes(len(written))


@given(st.lists(st.binary(max_size=1500), max_size=4))
def test_the_standard_library_reads_what_we_write_and_we_find_it_again(contents: list[bytes]) -> None:
    named = [(f"{i}.png", content) for i, content in enumerate(contents)]
    file = io.BytesIO(tar_of(*named))
    assert len(file.getvalue()) % 10240 == 0
    with tarfile.open(fileobj=file, mode="r:") as tar:
        assert [member.name for member in tar.getmembers()] == [name for name, _ in named]
    found = list(walk(file, len(file.getvalue())))
    assert [(m.name, file.getvalue()[m.offset : m.offset + m.size]) for m in found if isinstance(m, Member)] == named
    assert len(found) == len(named)


@given(st.binary(max_size=4096))
def test_the_walk_over_anything_ends(content: bytes) -> None:
    assert len(list(walk(io.BytesIO(content), len(content)))) < 10


def test_a_negative_size_is_damage_and_not_an_endless_loop() -> None:
    info = tarfile.TarInfo("a.png")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 12
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    found = list(walk(io.BytesIO(bytes(header) * 4), 2048))
    assert len(found) == 1 and isinstance(found[0], Damage)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_damage(kind: bytes) -> None:
    info = tarfile.TarInfo("a.png")
    info.type, info.linkname = kind, "/etc/passwd"
    content = info.tobuf(tarfile.USTAR_FORMAT) + end_bytes(512)
    damage = next(iter(walk(io.BytesIO(content), len(content))))
    assert isinstance(damage, Damage) and "not a regular file" in damage.what


@pytest.mark.parametrize("name", ["a" * 101, "ä.png"])
def test_a_name_that_ustar_can_not_hold_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="shorten the key"):
        member_bytes(name, b"")
