"""Plain ustar members: the bytes we write, and a strict walk over a tar that names every damage."""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES
END_OF_TAR = bytes(2 * BLOCK_BYTES)


@dataclass(frozen=True)
class Member:
    """One file of a tar; `offset` is where its data starts, its header lies 512 bytes before."""

    name: str
    offset: int
    size: int


@dataclass(frozen=True)
class Damage:
    """What is wrong at a byte offset of a tar, and what was wanted there."""

    offset: int
    what: str
    wanted: str


def padded(size: int) -> int:
    """`size` rounded up to whole blocks."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def member_bytes(name: str, content: bytes) -> bytes:
    """Header, data and padding of one member; nothing in it depends on time, user or machine.

    Raises: ValueError if the name is not ASCII or longer than ustar's 100 bytes.
    """
    if not name.isascii() or len(name) > 100:
        raise ValueError(f"tar member name {name!r} is not ASCII of at most 100 bytes; shorten the key")
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime, info.uid, info.gid = len(content), 0o644, 0, 0, 0
    return info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(padded(len(content)) - len(content))


def end_bytes(size: int) -> bytes:
    """What closes a tar of `size` bytes: two zero blocks, then zeros up to a whole record."""
    return END_OF_TAR + bytes(-(size + len(END_OF_TAR)) % RECORD_BYTES)


def header_problem(header: bytes) -> str | None:
    """Why these 512 bytes are not the header of a regular ustar member; None when they are."""
    if len(header) != BLOCK_BYTES:
        return f"header cut after {len(header)} of {BLOCK_BYTES} bytes"
    stored, counted = _octal(header[148:156]), sum(header) - sum(header[148:156]) + 8 * 32
    if stored != counted:
        return f"header checksum is {stored}, its bytes sum to {counted}"
    if header[257:262] != b"ustar":
        return "not a ustar header"
    if header[156:157] not in (b"0", b"\0"):
        return f"member type {header[156:157]!r} is not a regular file"
    if _octal(header[124:136]) is None:
        return f"size field {header[124:136]!r} is not an octal number"
    return None


def _octal(field: bytes) -> int | None:
    text = field.strip(b" \0")
    return int(text, 8) if text and all(byte in b"01234567" for byte in text) else None


def header_member(header: bytes, offset: int) -> Member:
    """Name and size in a header that `header_problem` accepts; `offset` is the header's."""
    name, prefix = (field.split(b"\0", 1)[0].decode("utf-8", "backslashreplace") for field in (header[:100], header[345:500]))
    size = _octal(header[124:136])
    assert size is not None, "header_problem() comes before header_member()"
    return Member(f"{prefix}/{name}" if prefix else name, offset + BLOCK_BYTES, size)


def walk(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Members of a tar of `size` bytes in order; the first damage that hides what follows ends the walk.

    Reads headers only. Never extracts, never seeks outside the file, and always moves forward.
    """
    offset = 0
    while True:
        file.seek(offset)
        header = file.read(BLOCK_BYTES)
        if not header.strip(b"\0"):
            break
        problem = header_problem(header)
        if problem is not None:
            yield Damage(offset, problem, "a ustar header of a regular file, as `halfstep shards pack` writes")
            return
        member = header_member(header, offset)
        if member.offset + padded(member.size) > size:
            yield Damage(offset, f"member {member.name!r} is cut: the file ends at byte {size}", f"{member.size} bytes of data")
            return
        yield member
        offset = member.offset + padded(member.size)
    file.seek(offset)
    tail = file.read(size - offset) if offset < size else b""
    if len(tail) < len(END_OF_TAR):
        yield Damage(offset, f"the file ends at byte {size} without an end marker: it is cut", "two zero blocks after the last member")
    elif tail.strip(b"\0"):
        yield Damage(offset, "bytes that are not zero follow the end marker", "zeros up to the end of the file")
