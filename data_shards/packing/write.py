"""Writes tars whose index entry is known when they are closed, and commits both so that a kill leaves all or nothing."""

import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, final

from data_shards.files import fsync_directory, replace_file
from data_shards.index import Members, Shard
from data_shards.tars.tar import BLOCK_BYTES, end_bytes, member_bytes


@dataclass(frozen=True)
class PackedSample:
    """One sample as the members of its tar: (extension, content), in the order they are written."""

    key: str
    members: tuple[tuple[str, bytes], ...]


class Block(NamedTuple):
    """A member as it stands in a tar: its extension, the size of its content, and header, content and padding."""

    extension: str
    size: int
    written: bytes


def block(key: str, extension: str, content: bytes) -> Block:
    """The member of a sample."""
    return Block(extension, len(content), member_bytes(f"{key}.{extension}", content))


@final
class TarWriter:
    """Samples one after the other into a tar; `close` ends it and returns its index entry."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._name = name
        self._digest = hashlib.sha256()
        self._offset = 0
        self._keys: list[str] = []
        self._sizes: list[tuple[int, int]] = []
        self._members: dict[str, Members] = {}

    def add(self, key: str, blocks: Sequence[Block], image_size: tuple[int, int] | None = None) -> None:
        """Writes a sample; image_size: (width, height) in pixels where the index is to list it, then of every sample."""
        for extension, size, written in blocks:
            members = self._members.get(extension)
            if members is None:
                members = self._members[extension] = Members(*(array("q", [-1]) * len(self._keys) for _ in range(3)))
            members.offsets.append(self._offset + BLOCK_BYTES)
            members.sizes.append(size)
            members.crc32.append(zlib.crc32(written))
            self._write(written)
        self._keys.append(key)
        if image_size is not None:
            self._sizes.append(image_size)
        for members in self._members.values():
            if len(members.sizes) < len(self._keys):
                for column in (members.offsets, members.sizes, members.crc32):
                    column.append(-1)

    def close(self) -> Shard:
        """Writes what ends a tar; the file stays open."""
        self._write(end_bytes(self._offset))
        widths, heights = (array("q", side) for side in zip(*self._sizes, strict=True)) if self._sizes else (None, None)
        members = dict(sorted(self._members.items()))
        return Shard(self._name, self._offset, self._digest.hexdigest(), tuple(self._keys), members, widths, heights)

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self._offset += len(content)


def write_shard(file: BinaryIO, name: str, samples: Sequence[PackedSample]) -> Shard:
    """Writes one tar and returns its index entry."""
    writer = TarWriter(file, name)
    for sample in samples:
        writer.add(sample.key, [block(sample.key, extension, content) for extension, content in sample.members])
    return writer.close()


def commit_tar(file: BinaryIO, path: Path, entry_path: Path, entry: dict[str, object]) -> None:
    """Gives a written tar its name, and then its entry: an entry without its tar is never seen."""
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)
    fsync_directory(path.parent)
    replace_file(entry_path, json.dumps(entry).encode())


def temporary_name(path: Path) -> Path:
    """Where a tar is written before it is committed; of this process alone."""
    return path.with_name(f"{path.name}.{os.getpid()}.tmp")


def is_whole(path: Path, shard: Shard) -> bool:
    """Whether a tar still has the bytes that its entry says. Raises: OSError."""
    if not path.is_file() or path.stat().st_size != shard.size_bytes:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
