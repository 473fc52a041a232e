"""Files of shards that are being made from others: finished batches, then whole tars with their entries; imports no torch."""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import final

from data_shards.files import fsync_directory, read_json_object, replace_file
from data_shards.index import Shard, parse_shard
from data_shards.packing.write import TarWriter, block

MAX_NAME_CHARACTERS = 100  # of a ustar member


@final
@dataclass(frozen=True)
class Made:
    """What was made of one sample. position: in its shard; bad: why it is left out, "" if it is not; note: facts for the counts."""

    position: int
    members: Mapping[str, bytes] = field(default_factory=dict)
    note: object = None
    bad: str = ""


@final
class PartFile:
    """Finished batches of one shard, appended one by one; what a kill has left half written is cut off when it is opened.

    A record is a line `CRC32 BYTES JSON` and the members' contents, BYTES in all; the crc32 is over JSON and contents."""

    def __init__(self, path: Path) -> None:
        self._file = FileIO(path, "a+")
        self._ends = list(self._whole_records())
        os.ftruncate(self._file.fileno(), self._ends[-1] if self._ends else 0)

    @property
    def batches(self) -> int:
        """How many batches are finished; they are those from 0 on."""
        return len(self._ends)

    def append(self, made: Sequence[Made]) -> None:
        """Add a batch; on return it survives a kill and a power cut. Raises: OSError."""
        rows = [
            {"position": one.position, "bad": one.bad}
            if one.bad
            else {"position": one.position, "sizes": {name: len(content) for name, content in one.members.items()}, "note": one.note}
            for one in made
        ]
        head = json.dumps({"batch": self.batches, "samples": rows}, separators=(",", ":")).encode()
        contents = b"".join(content for one in made for content in one.members.values())
        record = memoryview(b"%08x %d %b\n%b" % (zlib.crc32(contents, zlib.crc32(head)), len(contents), head, contents))
        written = 0
        while written < len(record):
            written += self._file.write(record[written:]) or 0
        os.fsync(self._file.fileno())
        self._ends.append((self._ends[-1] if self._ends else 0) + len(record))

    def read(self) -> Iterator[Made]:
        """All that was made, in order."""
        for record in self._records():
            yield from record[0]

    def close(self) -> None:
        """Close the file; it stays."""
        self._file.close()

    def _whole_records(self) -> Iterator[int]:
        return (end for _, end in self._records())

    def _records(self) -> Iterator[tuple[list[Made], int]]:
        """Each whole record and where it ends; stops at the first that is not."""
        with open(self._file.fileno(), "rb", closefd=False) as file:
            file.seek(0)
            count = 0
            while (line := file.readline()).endswith(b"\n"):
                fields = line[:-1].split(b" ", 2)
                if len(fields) != 3 or not fields[1].isdigit():
                    return
                contents = file.read(int(fields[1]))
                if len(contents) != int(fields[1]) or fields[0] != b"%08x" % zlib.crc32(contents, zlib.crc32(fields[2])):
                    return
                record = json.loads(fields[2])
                if record["batch"] != count:
                    return
                count += 1
                yield _made(record["samples"], contents), file.tell()


def _made(rows: Sequence[Mapping[str, object]], contents: bytes) -> list[Made]:
    found, offset = [], 0
    for row in rows:
        match row:
            case {"position": int(position), "bad": str(bad)}:
                found.append(Made(position, bad=bad))
            case {"position": int(position), "sizes": dict(sizes), "note": note}:
                members = {}
                for name, size in sizes.items():
                    members[name], offset = contents[offset : offset + size], offset + size
                found.append(Made(position, members, note))
            case _:
                raise AssertionError("the crc32 of a record matches, but it is not what append writes")
    return found


@final
@dataclass(frozen=True)
class Entry:
    """A finished shard. shard: None if no sample was left; left_out: key and reason of each; notes: of the samples, in order."""

    shard: Shard | None
    left_out: tuple[tuple[str, str], ...]
    notes: tuple[object, ...]

    @classmethod
    def read(cls, path: Path) -> "Entry | None":
        """None where there is none that is whole."""
        if not path.exists():
            return None
        try:
            fields = read_json_object(path)
            shard, left_out, notes = fields["shard"], fields["left_out"], fields["notes"]
            assert isinstance(left_out, list) and isinstance(notes, list)
            found = None if shard is None else parse_shard(shard, str(path))
        except (ValueError, KeyError, AssertionError):
            return None  # written whole or not at all: a damaged disk, and the shard is made again
        return cls(found, tuple((str(key), str(reason)) for key, reason in left_out), tuple(notes))

    def write(self, path: Path) -> None:
        """Write it, whole or not at all."""
        shard = None if self.shard is None else self.shard.to_json()
        replace_file(path, json.dumps({"shard": shard, "left_out": self.left_out, "notes": self.notes}, separators=(",", ":")))


Row = tuple[str, Mapping[str, bytes], tuple[int, int] | None]


def write_tar(path: Path, samples: Iterable[Row]) -> Shard | None:
    """Write (key, members, image size or None) after each other as a tar, under a temporary name and then its own.

    None, and no file, for no sample. On return it survives a power cut.
    Raises: OSError; ValueError for a name that a tar cannot hold."""
    temporary = path.with_name(f"{path.name}.tmp")
    empty = True
    with temporary.open("wb") as file:
        writer = TarWriter(file, path.name)
        for key, members, image_size in samples:
            writer.add(key, [block(key, extension, content) for extension, content in members.items()], image_size)
            empty = False
        shard = writer.close()
        file.flush()
        os.fsync(file.fileno())
    if empty:
        temporary.unlink()
        return None
    os.replace(temporary, path)
    fsync_directory(path.parent)
    return shard
