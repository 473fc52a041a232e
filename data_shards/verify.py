"""Checks every byte of a folder of shards against its index; reads, and neither runs nor writes anything."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from data_shards.config import ALLOWED_EXTENSIONS, IMAGE_FORMATS, INDEX_NAME, is_allowed_extension, is_image, member_limit_bytes
from data_shards.images import DecodeError, image_pixels
from data_shards.index import Members, Shard, ShardIndex, ShardIndexError, is_safe_member_name
from data_shards.tar import BLOCK_BYTES, Damage, Member, padded, walk

HASH_BYTES = 2**20
REPACK = "pack it again into a new folder, or restore it from a copy"


@final
@dataclass(frozen=True)
class Problem:
    """One finding: where it lies, what is there, what was wanted, and how to mend it. offset: bytes, None for a whole file."""

    shard: str
    key: str | None
    offset: int | None
    what: str
    wanted: str
    mend: str

    def __str__(self) -> str:
        """One line for a message."""
        sample = f": sample {self.key!r}" if self.key is not None else ""
        at = f" at byte {self.offset}" if self.offset is not None else ""
        return f"{self.shard}{sample}{at}: {self.what}; wanted {self.wanted}; {self.mend}"


def verify(root: str | Path, *, progress: Callable[[int, int], None] | None = None) -> list[Problem]:
    """Every problem of the shards in ROOT; empty if they are what the index says. progress: called with shards done, total."""
    root = Path(root)
    try:
        index = ShardIndex.load(root)
    except ShardIndexError as error:
        return [Problem(INDEX_NAME, None, None, str(error), "a valid index", REPACK)]
    problems = _strangers(index)
    for number, shard in enumerate(index.shards):
        problems += _verify_shard(root / shard.name, shard, index)
        if progress is not None:
            progress(number + 1, len(index.shards))
    return problems


def _strangers(index: ShardIndex) -> list[Problem]:
    """Tars that the index does not list."""
    listed = {shard.name for shard in index.shards}
    found = sorted(path.name for path in index.root.glob("*.tar") if path.name not in listed)
    return [
        Problem(name, None, None, "a shard that is not in the index", "only listed shards", "remove it, or pack again") for name in found
    ]


def _verify_shard(path: Path, shard: Shard, index: ShardIndex) -> list[Problem]:
    if not path.is_file():
        return [Problem(shard.name, None, None, "the file is missing", f"a tar of {shard.size_bytes} bytes", REPACK)]
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        members, problems = _walk(file, size, shard.name)
        if size != shard.size_bytes:
            problems.append(Problem(shard.name, None, None, f"it is {size} bytes long", f"{shard.size_bytes} bytes", REPACK))
        elif digest != shard.sha256:
            problems.append(Problem(shard.name, None, None, f"its sha256 is {digest[:16]}...", f"{shard.sha256[:16]}...", REPACK))
        problems += _unlisted(members, shard)
        problems += _samples(file, members, shard, index)
    return problems


def _walk(file: BinaryIO, size: int, shard: str) -> tuple[dict[str, Member], list[Problem]]:
    """Members by name, and what is wrong with the tar as such."""
    members: dict[str, Member] = {}
    problems: list[Problem] = []
    for found in walk(file, size):
        if isinstance(found, Damage):
            problems.append(Problem(shard, None, found.offset, found.what, found.wanted, REPACK))
        elif found.name in members:
            problems.append(Problem(shard, None, found.offset, f"a second member {found.name!r}", "one member of a name", REPACK))
        else:
            members[found.name] = found
    if not members and not problems:
        problems.append(Problem(shard, None, None, "an empty shard", "at least one sample", REPACK))
    return members, problems


def _unlisted(members: dict[str, Member], shard: Shard) -> Iterator[Problem]:
    """Members that no sample of the index has, and why they would not be allowed anyway."""
    listed = {
        f"{key}.{extension}"
        for extension, rows in shard.members.items()
        for key, size in zip(shard.keys, rows.sizes, strict=True)
        if size >= 0
    }
    for name, member in members.items():
        if name in listed:
            continue
        extension = name.rpartition("/")[2].partition(".")[2]
        what, wanted = f"member {name!r} is not in the index", "only members that the index lists"
        if not is_safe_member_name(name):
            what, wanted = f"member name {name!r} leads out of the folder", "a plain name"
        elif not is_allowed_extension(extension.lower()):
            what, wanted = f"member {name!r} has a forbidden extension", f"one of {', '.join('.' + e for e in ALLOWED_EXTENSIONS)}"
        yield Problem(shard.name, None, member.offset, what, wanted, REPACK)


def _samples(file: BinaryIO, members: dict[str, Member], shard: Shard, index: ShardIndex) -> Iterator[Problem]:
    """Samples of the index whose members are missing, elsewhere, changed, or can't be decoded."""
    for position, key in enumerate(shard.keys):
        for extension, rows in shard.members.items():
            if rows.sizes[position] < 0:
                continue
            fault = _member_fault(
                file,
                members.get(f"{key}.{extension}"),
                rows,
                position,
                extension,
                index.size_at(shard, position) if is_image(extension) else (0, 0),
            )
            if fault is not None:
                what, wanted = fault
                yield Problem(shard.name, key, rows.offsets[position], f"{key}.{extension}: {what}", wanted, REPACK)


def _member_fault(
    file: BinaryIO, member: Member | None, rows: Members, position: int, extension: str, image_size: tuple[int, int]
) -> tuple[str, str] | None:
    """What is wrong with one member and what was wanted, or None."""
    offset, size = rows.offsets[position], rows.sizes[position]
    if member is None:
        return "it is not in the tar: the shard is cut or damaged before it", f"{size} bytes here"
    if (member.offset, member.size) != (offset, size):
        return f"{member.size} bytes at byte {member.offset}", f"{size} bytes at byte {offset}, as the index says"
    if size > member_limit_bytes(extension):
        return f"{size} bytes", f"at most {member_limit_bytes(extension)}"
    file.seek(offset - BLOCK_BYTES)
    block = file.read(BLOCK_BYTES + padded(size))
    if zlib.crc32(block) != rows.crc32[position]:
        return "its bytes were changed after packing", "the crc32 in the index"
    if is_image(extension):
        try:
            image_pixels(block[BLOCK_BYTES : BLOCK_BYTES + size], extension, size=image_size)
        except DecodeError as error:
            return str(error), f"a whole {IMAGE_FORMATS[extension]} of {image_size[0]} x {image_size[1]} pixels"
    return None
