"""Tar members: the plain ones that we write, and a strict walk over any tar that names every damage."""

import re
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from data_shards.tars.pax import MAX_EXTENSION_BYTES, TarError, member_name, pax_name_and_size

BLOCK_BYTES = 512
RECORD_BYTES = 20 * BLOCK_BYTES
END_OF_TAR = bytes(2 * BLOCK_BYTES)
MAX_TAIL_BYTES = 2**20  # zeros after the end marker: a record of GNU tar's largest usual blocking factor
_OCTAL = re.compile(rb" *([0-7]+)[ \0]*")
_LARGEST_OCTAL = 8**11 - 1
_REGULAR = b"0\0"
_WANTED = "a ustar, PAX or GNU header of a regular file"
# What stands at the start of files that are packed once more, and what unpacks them
_COMPRESSED: Mapping[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("gzip", "gzip -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
    b"\xfd7zXZ\0": ("xz", "xz -d"),
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\x04\x22\x4d\x18": ("lz4", "lz4 -d"),
    b"PK\x03\x04": ("zip", "unzip"),
}
_KINDS: Mapping[bytes, str] = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"5": "a folder with data",
    b"6": "a FIFO",
    b"7": "a contiguous file",
    b"K": "the long target of a link",
    b"S": "a sparse file",
    b"M": "a part of a file in several volumes",
    b"V": "a volume's label",
    b"D": "a dumped folder",
}


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
    """Why these 512 bytes are not the header of a regular member; None when they are."""
    try:
        header_member(header, 0)
    except TarError as error:
        return str(error)
    return None if header[156:157] in _REGULAR else _kind_problem(header)


def header_member(header: bytes, offset: int) -> Member:
    """Name and size in a header, of whatever type; `offset` is the header's. Raises: TarError if it is none."""
    if len(header) != BLOCK_BYTES:
        raise TarError(f"header cut after {len(header)} of {BLOCK_BYTES} bytes")
    stored, counted = _octal(header[148:156]), sum(header) - sum(header[148:156]) + 8 * 32
    if stored != counted:
        raise TarError(f"header checksum is {stored}, its bytes sum to {counted}")
    if header[257:262] != b"ustar":
        raise TarError("not a ustar header")
    size, name, prefix = _octal(header[124:136]), header[:100].rstrip(b"\0"), header[345:500].rstrip(b"\0")
    if size is None:
        raise TarError(f"size field {header[124:136]!r} of member {_short_name(header)!r} is not an octal number")
    if b"\0" in name or b"\0" in prefix:
        raise TarError(f"member {_short_name(header)!r} has bytes after the NUL that ends its name")
    if prefix and header[262:263] == b" ":
        raise TarError(f"member {_short_name(header)!r} has GNU's times of access in its header, which ustar would read as a name")
    return Member((prefix + b"/" + name if prefix else name).decode("utf-8", "backslashreplace"), offset + BLOCK_BYTES, size)


def _short_name(header: bytes) -> str:
    """The name in a header that is refused, for the message."""
    return header[:100].split(b"\0", 1)[0].decode("utf-8", "backslashreplace")


def _kind_problem(header: bytes) -> str:
    kind = header[156:157]
    return f"member {_short_name(header)!r} is {_KINDS.get(kind, f'of type {kind!r}')}, not a regular file"


def _octal(field: bytes) -> int | None:
    found = _OCTAL.fullmatch(field)
    return int(found[1], 8) if found is not None else None


def walk(file: BinaryIO, size: int) -> Iterator[Member | Damage]:
    """Regular members of a tar of `size` bytes in order; the first damage that hides what follows ends the walk.

    Long names and sizes of PAX and GNU headers are applied, folders left out; links, devices, sparse files and the like are damage.
    Reads headers only. Never extracts or unpacks, never seeks outside the file, and always moves forward.
    """
    offset, extension = 0, None
    file.seek(0)
    packed = compression(file.read(8))
    if packed is not None:
        yield Damage(0, packed, "a plain tar")
        return
    while True:
        file.seek(offset)
        header = file.read(BLOCK_BYTES)
        if not header.strip(b"\0"):
            break
        try:
            kind, member = _read_header(header, offset, size)
            if kind in b"xgL":
                extension = _extended(file, kind, member, extension)
            elif kind in _REGULAR:
                member = _applied(extension, member, size) if extension is not None else member
                extension = None
                yield member
            else:  # a folder: its name matters to nobody
                extension = None
        except TarError as error:
            yield Damage(offset, str(error), _WANTED)
            return
        offset = member.offset + padded(member.size)
    if extension is not None:
        yield Damage(offset, f"the member that an extension header names ({extension.name!r:.60}) is missing", _WANTED)
    else:
        yield from _tail(file, offset, size)


def compression(start: bytes) -> str | None:
    """What a file is that begins so, if it would have to be unpacked first; nothing is ever unpacked on a guess."""
    for magic, (name, command) in _COMPRESSED.items():
        if start.startswith(magic):
            return f"it is {name}, not tar: unpack it with {command}"
    return None


@dataclass(frozen=True)
class _Extension:
    """What extension headers say of the member after them; kinds: their types, each at most once."""

    kinds: bytes
    name: str | None
    size: int | None


def _read_header(header: bytes, offset: int, size: int) -> tuple[bytes, Member]:
    """Type and member of a header whose data, as the header counts it, lies within the file. Raises: TarError."""
    kind, member = header[156:157], header_member(header, offset)
    if kind not in (b"0", b"\0", b"x", b"g", b"L") and not (kind == b"5" and member.size == 0):
        raise TarError(_kind_problem(header))
    _check_whole(member, size)
    return kind, member


def _check_whole(member: Member, size: int) -> None:
    if member.offset + padded(member.size) > size:
        raise TarError(f"member {member.name!r:.200} is cut: it has {member.size} bytes, but the file ends at byte {size}")


def _extended(file: BinaryIO, kind: bytes, header: Member, before: _Extension | None) -> _Extension | None:
    """What is known of the next member after one more extension header. Raises: TarError."""
    what = {b"x": "a PAX header", b"g": "a global PAX header", b"L": "a GNU long name"}[kind]
    if header.size > MAX_EXTENSION_BYTES:
        raise TarError(f"{what} of {header.size} bytes, at most {MAX_EXTENSION_BYTES} are read")
    kinds = before.kinds if before is not None else b""
    if kind in kinds or (kind == b"g" and kinds):
        raise TarError(f"{what} where the member should come that another extension header names")
    content = file.read(header.size)
    if len(content) < header.size:
        raise TarError(f"{what} is cut")
    if kind == b"L":
        name, size = member_name(content.rstrip(b"\0")), None
    else:
        name, size = pax_name_and_size(content, for_all=kind == b"g")
    if kind == b"g":
        return None
    if before is not None and before.name is not None and name is not None:
        raise TarError(f"two extension headers name one member {before.name!r:.60} and {name!r:.60}")
    name = name if name is not None or before is None else before.name
    return _Extension(kinds + kind, name, size if size is not None or before is None else before.size)


def _applied(extension: _Extension, member: Member, size: int) -> Member:
    """The member as its extension headers say. Raises: TarError if they give it a size that its own header contradicts."""
    name = extension.name if extension.name is not None else member.name
    if extension.size is None or extension.size == member.size:
        return Member(name, member.offset, member.size)
    if extension.size <= _LARGEST_OCTAL:
        raise TarError(f"member {name!r:.200} has {extension.size} bytes by its PAX header, {member.size} by its own")
    applied = Member(name, member.offset, extension.size)
    _check_whole(applied, size)
    return applied


def _tail(file: BinaryIO, offset: int, size: int) -> Iterator[Damage]:
    """What is wrong with the end of a tar whose members end at `offset`."""
    left = size - offset
    if left < len(END_OF_TAR):
        yield Damage(offset, f"the file ends at byte {size} without an end marker: it is cut", "two zero blocks after the last member")
        return
    file.seek(offset)
    if file.read(min(left, MAX_TAIL_BYTES)).strip(b"\0"):
        yield Damage(offset, "bytes that are not zero follow the end marker", "zeros up to the end of the file")
    elif left > MAX_TAIL_BYTES:
        yield Damage(offset, f"{left} bytes follow the last member", f"an end marker and at most {MAX_TAIL_BYTES} bytes of zeros in all")
