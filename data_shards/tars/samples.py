"""The samples of one tar that others wrote, found without trusting a byte of it; `python -m` does it confined, for index_tars."""

import hashlib
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, final

from data_shards.config import (
    CAPTION_EXTENSION,
    TENSOR_EXTENSION,
    is_allowed_extension,
    is_image,
    member_limit_bytes,
)
from data_shards.image_header import DecodeError, image_header_size
from data_shards.index import is_key
from data_shards.npy_header import npy_type_and_shape
from data_shards.tars.confined import arguments, confine, write_line
from data_shards.tars.pax import TarError
from data_shards.tars.tar import BLOCK_BYTES, Damage, Member, padded, walk

MAX_MEMBERS = 2**17
MAX_TAR_BYTES = 2**36  # hashed at 300 MB/s or more: 4 minutes
NAMED = 20  # left-out members that are listed; all are counted
MAX_IGNORED_EXTENSIONS = 50
READ_BYTES = 2**20
_NAME = re.compile(r"((?:.*/|)[^/.]+)[.]([^/]*)", re.DOTALL)  # WebDataset's: the key ends at the first dot of the last part
_PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]{1,255}")  # most keys are, and is_key takes 5 us
_EXTENSION = re.compile(r"[a-z0-9_.-]{1,20}")


@final
@dataclass
class Sample:
    """One sample: its members by extension as [offset, size, crc32], and its image's size in pixels."""

    members: dict[str, list[int]]
    width: int = 0
    height: int = 0
    fault: str | None = None


@final
@dataclass
class Report:
    """What of a tar is not in its index: members of other extensions, with an example of each, and what had to be left out, by reason."""

    ignored: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    named: list[str] = field(default_factory=list)

    def leave_out(self, name: str, reason: str, detail: str = "") -> None:
        """Counts and, among the first, names it."""
        self.left_out[reason] += 1
        if len(self.named) < NAMED:
            self.named.append(f"{name!r:.200}: {detail or reason}")

    def ignore(self, name: str, extension: str) -> None:
        """Counts a member of an extension that is not read."""
        shown = extension if _EXTENSION.fullmatch(extension) else "other"
        if shown not in self.ignored and len(self.ignored) >= MAX_IGNORED_EXTENSIONS:
            shown = "other"
        self.ignored[shown] += 1
        self.examples.setdefault(shown, f"{name!r:.200}")


def tar_samples(file: BinaryIO, size: int) -> tuple[dict[str, Sample], str, Report]:
    """The samples of a tar of `size` bytes by key, in order of their first members, its sha256, and what is not among them.

    Members of one key belong together, wherever they lie; a key that has a member twice is left out, for nobody can say which belong
    together. Raises: TarError naming the member of a tar that is damaged, dangerous, too large or without any sample.
    """
    report = Report()
    samples = _grouped(file, size, report)
    digest = _read(file, size, samples, report)
    kept: dict[str, Sample] = {}
    for key, sample in samples.items():
        if sample.fault is None and not any(is_image(extension) for extension in sample.members):
            sample.fault = "no image"
            report.leave_out(key, sample.fault)
        if sample.fault is None:
            kept[key] = sample
    if not kept:
        seen = [*report.named[:1], *(f"{name}: its extension is not read" for name in list(report.examples.values())[:1])]
        raise TarError(f"it holds no sample with an image that can be used ({'; '.join(seen) or 'no member at all'})")
    return kept, digest, report


def _grouped(file: BinaryIO, size: int, report: Report) -> dict[str, Sample]:
    """Members by key, from headers alone. Raises: TarError."""
    if size > MAX_TAR_BYTES:
        raise TarError(f"it has {size} bytes, at most {MAX_TAR_BYTES} are read; split it")
    samples: dict[str, Sample] = {}
    for number, found in enumerate(walk(file, size)):
        if isinstance(found, Damage):
            raise TarError(f"at byte {found.offset}: {found.what}; wanted {found.wanted}")
        if number >= MAX_MEMBERS:
            raise TarError(f"at byte {found.offset}: member {found.name!r:.200} is one of more than {MAX_MEMBERS}; split the tar")
        place = _place(found, report)
        if place is None:
            continue
        key, extension = place
        sample = samples.setdefault(key, Sample({}))
        if extension in sample.members and sample.fault is None:
            sample.fault = "its key comes twice"
            report.leave_out(key, sample.fault, f"a second member {found.name!r:.200} at byte {found.offset}; the sample is left out")
        elif is_image(extension) and any(is_image(other) for other in sample.members):
            report.leave_out(found.name, "a second image of its sample")
        else:
            sample.members[sys.intern(extension)] = [found.offset, found.size, 0]
    return samples


def _place(member: Member, report: Report) -> tuple[str, str] | None:
    """Key and extension of a member that may be part of a sample; None once the report has it. Raises: TarError."""
    if member.name.startswith("/") or ".." in member.name.split("/"):
        raise TarError(f"member {member.name!r:.200} leads out of the folder that the tar would be unpacked to")
    parts = _NAME.fullmatch(member.name)
    if parts is None:
        report.ignore(member.name, "none")
        return None
    key, extension = parts[1], parts[2].lower()
    if not is_allowed_extension(extension):
        report.ignore(member.name, extension)
        return None
    limit = member_limit_bytes(extension)
    if not (_PLAIN_KEY.fullmatch(key) or is_key(key)):
        report.leave_out(member.name, "an unsafe name")
    elif member.size > limit:
        report.leave_out(member.name, "too large", f"{member.size} bytes, at most {limit} are read")
    else:
        return key, extension
    return None


def _read(file: BinaryIO, size: int, samples: dict[str, Sample], report: Report) -> str:
    """Reads the tar once: its sha256, every member's crc32, and a look at what each one holds. Raises: TarError."""
    digest, at = hashlib.sha256(), 0
    file.seek(0)
    wanted = sorted((row[0], key, extension) for key, sample in samples.items() for extension, row in sample.members.items())
    for offset, key, extension in wanted:
        for block in _blocks(file, offset - BLOCK_BYTES - at):
            digest.update(block)
        sample = samples[key]
        row = sample.members[extension]
        block = file.read(BLOCK_BYTES + padded(row[1]))
        if len(block) < BLOCK_BYTES + padded(row[1]):
            raise TarError(f"it became shorter while it was read, at byte {offset}")
        digest.update(block)
        row[2] = zlib.crc32(block)
        at = offset + padded(row[1])
        if sample.fault is None:
            _look(block[BLOCK_BYTES : BLOCK_BYTES + row[1]], key, extension, sample, report)
    for block in _blocks(file, size - at):
        digest.update(block)
    return digest.hexdigest()


def _blocks(file: BinaryIO, count: int) -> Iterator[bytes]:
    while count > 0:
        block = file.read(min(count, READ_BYTES))
        if not block:
            raise TarError("it became shorter while it was read")
        count -= len(block)
        yield block


def _look(content: bytes, key: str, extension: str, sample: Sample, report: Report) -> None:
    """Notes an image's size; leaves out a sample whose image or caption can't be what it should be, or an array that is none."""
    name = f"{key}.{extension}"
    try:
        if is_image(extension):
            sample.width, sample.height = image_header_size(content, extension)
        elif extension == CAPTION_EXTENSION:
            content.decode()
        elif extension.rpartition(".")[2] == TENSOR_EXTENSION:
            npy_type_and_shape(content)
    except UnicodeDecodeError as error:
        sample.fault = "a caption that is not UTF-8"
        report.leave_out(name, sample.fault, f"{sample.fault}: {error.reason} at byte {error.start}")
    except DecodeError as error:
        if is_image(extension):
            sample.fault = "an unusable image"
            report.leave_out(name, sample.fault, str(error))
        else:
            del sample.members[extension]
            report.leave_out(name, "an unusable array", str(error))


def main() -> None:
    """Standard input is the tar; writes a line a sample, then one with what is left of the report."""
    confine(arguments())
    try:
        file = open(0, "rb", buffering=0, closefd=False)
        size = file.seek(0, 2)
        samples, digest, report = tar_samples(file, size)
        for key, sample in samples.items():
            write_line({"key": key, "size": [sample.width, sample.height], "members": sample.members})
        write_line({"done": size, "sha256": digest, **vars(report)})
    except TarError as error:
        write_line({"refused": str(error)})
    except MemoryError:
        write_line({"refused": "its headers need more memory than a tar is given"})
    except (OSError, RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        write_line({"refused": f"reading it failed, which is a bug of halfstep: {type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()
