"""Checks every byte of a folder of shards against its index; reads, and neither runs nor writes anything."""

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, final

from data_shards.config import (
    ALLOWED_EXTENSIONS,
    IMAGE_FORMATS,
    INDEX_NAME,
    MASK_EXTENSION,
    TENSOR_EXTENSION,
    is_allowed_extension,
    is_image,
    member_limit_bytes,
)
from data_shards.images import DecodeError, image_pixels, mask_pixels
from data_shards.index import Members, Shard, ShardIndex, is_safe_member_name
from data_shards.npy_header import npy_type_and_shape
from data_shards.remote.retry import FetchError
from data_shards.remote.store import Store, store_of
from data_shards.tars.tar import BLOCK_BYTES, Damage, Member, padded, walk

MAX_UNLISTED = 1000  # members of one tar beyond those of the index; a tar of millions must not fill the memory
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
    """Every problem of the shards of ROOT/index.json; empty if they are what it says. Tars that lie afar come through the node's cache.

    progress: called with shards done, total. Memory is bounded: one member at a time is read.
    """
    root = Path(root)
    try:
        index = ShardIndex.load(root)
        store = store_of(index)
    except ValueError as error:
        return [Problem(INDEX_NAME, None, None, str(error), "a valid index", REPACK)]
    problems = _strangers(index)
    for number, shard in enumerate(index.shards):
        problems += _verify_shard(store, shard, index)
        if progress is not None:
            progress(number + 1, len(index.shards))
    return problems


def _strangers(index: ShardIndex) -> list[Problem]:
    """Tars beside the index that it does not list."""
    listed = {shard.name for shard in index.shards} if index.location is None else set()
    found = sorted(path.name for path in index.root.glob("*.tar") if path.name not in listed)
    return [
        Problem(name, None, None, "a shard that is not in the index", "only listed shards", "remove it, or pack again") for name in found
    ]


def _verify_shard(store: Store, shard: Shard, index: ShardIndex) -> list[Problem]:
    try:
        file = store.open(shard)
    except FileNotFoundError:
        return [Problem(shard.name, None, None, "the file is missing", f"a tar of {shard.size_bytes} bytes", REPACK)]
    except (OSError, FetchError) as error:
        return [Problem(shard.name, None, None, f"it can't be opened: {error}", f"a tar of {shard.size_bytes} bytes", REPACK)]
    with file:
        size = file.seek(0, 2)
        members, problems, unlisted = _walk(file, size, shard)
        changed = size != shard.size_bytes
        if changed:
            problems.append(Problem(shard.name, None, None, f"it is {size} bytes long", f"{shard.size_bytes} bytes", REPACK))
        else:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            changed = digest != shard.sha256
            if changed:
                problems.append(Problem(shard.name, None, None, f"its sha256 is {digest[:16]}...", f"{shard.sha256[:16]}...", REPACK))
        # A tar of others has more members than its index, counted there; while it is the same, they are the same.
        if changed or "ignored" not in index.pack:
            problems += unlisted
        problems += _samples(file, members, shard, index)
    return problems


def _walk(file: BinaryIO, size: int, shard: Shard) -> tuple[dict[str, Member], list[Problem], list[Problem]]:
    """The members that the index lists, by its names; what is wrong with the tar as such; and the members that are not in the index."""
    listed = {
        f"{key}.{extension}"
        for extension, rows in shard.members.items()
        for key, stored in zip(shard.keys, rows.sizes, strict=True)
        if stored >= 0
    }
    members: dict[str, Member] = {}
    problems: list[Problem] = []
    unlisted: list[Problem] = []
    for found in walk(file, size):
        if isinstance(found, Damage):
            problems.append(Problem(shard.name, None, found.offset, found.what, found.wanted, REPACK))
            continue
        name = _indexed_name(found.name)
        if name in members:
            problems.append(Problem(shard.name, None, found.offset, f"a second member {found.name!r}", "one member of a name", REPACK))
        elif name in listed:
            members[name] = found
        elif len(unlisted) <= MAX_UNLISTED:
            unlisted.append(_unlisted(found, shard) if len(unlisted) < MAX_UNLISTED else _more_unlisted(found, shard))
    if not members and not problems and not unlisted:
        problems.append(Problem(shard.name, None, None, "an empty shard", "at least one sample", REPACK))
    return members, problems, unlisted


def _indexed_name(name: str) -> str:
    """A member's name with its extension in small letters, as indexes have it."""
    folder, slash, last = name.rpartition("/")
    key, dot, extension = last.partition(".")
    return f"{folder}{slash}{key}{dot}{extension.lower()}"


def _unlisted(member: Member, shard: Shard) -> Problem:
    """A member that no sample of the index has, and why it would not be allowed anyway."""
    extension = member.name.rpartition("/")[2].partition(".")[2]
    what, wanted = f"member {member.name!r} is not in the index", "only members that the index lists"
    if not is_safe_member_name(member.name):
        what, wanted = f"member name {member.name!r} leads out of the folder", "a plain name"
    elif not is_allowed_extension(extension.lower()):
        what, wanted = f"member {member.name!r} has a forbidden extension", f"one of {', '.join('.' + e for e in ALLOWED_EXTENSIONS)}"
    return Problem(shard.name, None, member.offset, what, wanted, REPACK)


def _more_unlisted(member: Member, shard: Shard) -> Problem:
    what = f"more than {MAX_UNLISTED} members that are not in the index"
    return Problem(shard.name, None, member.offset, what, "only members that the index lists", REPACK)


def _samples(file: BinaryIO, members: dict[str, Member], shard: Shard, index: ShardIndex) -> Iterator[Problem]:
    """Samples of the index whose members are missing, elsewhere, changed, or can't be decoded."""
    has_images = any(map(is_image, shard.members))
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
                index.size_at(shard, position) if is_image(extension) or (extension == MASK_EXTENSION and has_images) else None,
            )
            if fault is not None:
                what, wanted = fault
                yield Problem(shard.name, key, rows.offsets[position], f"{key}.{extension}: {what}", wanted, REPACK)


def _member_fault(
    file: BinaryIO, member: Member | None, rows: Members, position: int, extension: str, image_size: tuple[int, int] | None
) -> tuple[str, str] | None:
    """What is wrong with one member and what was wanted, or None; image_size: of an image or of a mask's image, where there is one."""
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
    content = block[BLOCK_BYTES : BLOCK_BYTES + size]
    try:
        if extension == MASK_EXTENSION and image_size is not None:
            mask_pixels(content, size=image_size)
        elif image_size is not None:
            image_pixels(content, extension, size=image_size)
        elif extension.rpartition(".")[2] == TENSOR_EXTENSION:
            npy_type_and_shape(content)
    except DecodeError as error:
        if image_size is None:
            return str(error), "plain numbers"
        what = "mask in black and white" if extension == MASK_EXTENSION else IMAGE_FORMATS[extension]
        return str(error), f"a whole {what} of {image_size[0]} x {image_size[1]} pixels"
    return None
