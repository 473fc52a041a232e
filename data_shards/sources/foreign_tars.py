"""WebDataset tars that others wrote as a source of rows, to be packed anew; nothing is unpacked to files, unpickled or decompressed."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, final

from data_shards.config import ATTRIBUTES_EXTENSION, IMAGE_FORMATS, MASK_EXTENSION, member_limit_bytes
from data_shards.sources.folder import stated_licence
from data_shards.sources.rows import Part, Row, UnreadableRow, even_parts
from data_shards.tars.places import find_tars
from data_shards.tars.tar import Damage, Member, walk

# WebDataset's: the key ends at the first dot of the last part
_NAME = re.compile(r"((?:.*/|)[^/.]+)[.]([^/]*)", re.DOTALL)
_TEXT_EXTENSIONS = ("txt", "caption", "text")
_TEXT_ENTRIES = ("caption", "text", "prompt")
_MAX_EXTRA_CHARACTERS = 2000  # URL, photographer: what a .json says of an image besides its caption

Sample = Mapping[str, Member]


@final
@dataclass(frozen=True)
class ForeignTarSource:
    """The samples of local tars, in the order of the tars' names; members of one key belong together within their tar.

    counts: samples of each tar; listings_sha256: of its members' names, offsets and sizes. Make one with `open`.
    """

    tars: tuple[Path, ...]
    counts: tuple[int, ...]
    listings_sha256: tuple[str, ...]
    licence_name: str = "not stated"

    @classmethod
    def open(cls, arguments: Sequence[str], *, licence: str = "not stated") -> "ForeignTarSource":
        """Reads all headers, so that a bad tar is known before hours of packing; arguments: tars, folders, or patterns with {000..099}.

        Raises: ValueError naming the tar that is not local, damaged, dangerous, compressed or empty.
        """
        if not arguments:
            raise ValueError('--source tar wants tars: halfstep shards pack --source tar "data/{000..099}.tar" --out OUT')
        found = find_tars(arguments).tars
        remote = next((tar.location for tar in found if tar.location.is_remote), None)
        if remote is not None:
            raise ValueError(f"{remote}: tars are packed from local files; fetch them, or use them where they lie: halfstep shards index")
        paths = tuple(tar.location.path for tar in found)
        listed = [_listing(path) for path in paths]
        return cls(paths, tuple(count for count, _ in listed), tuple(digest for _, digest in listed), licence)

    @property
    def count(self) -> int:
        """Number of samples in all tars."""
        return sum(self.counts)

    def describe(self) -> dict[str, object]:
        """The tars' names and a hash of their headers; where they lie is not told."""
        listing = "\n".join(f"{path.name}\t{digest}" for path, digest in zip(self.tars, self.listings_sha256, strict=True))
        digest = hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest()
        return {"kind": "tar", "name": self.tars[0].stem, "tars": len(self.tars), "count": self.count, "listing_sha256": digest}

    def licence(self) -> dict[str, object]:
        """What the user stated."""
        return stated_licence(self.licence_name)

    def parts(self, rows: int) -> Sequence[Part]:
        """About `rows` samples of one tar."""
        return [Part(tar, part.first, part.count) for tar, count in enumerate(self.counts) for part in even_parts(count, rows)]

    def read(self, part: Part, size: int | None) -> Iterator[Row | UnreadableRow]:
        """The samples of a part; keys are TAR-NUMBER, and `extra` holds the sample's own.

        Raises: ValueError naming the tar if it was changed since `open`.
        """
        del size
        assert part.count is not None, "parts() says how many samples a part has"
        path = self.tars[part.file]
        samples, digest = _samples(path, path.stat().st_mtime_ns)
        if digest != self.listings_sha256[part.file]:
            raise ValueError(f"{path}: it was changed since the pack began; start again with a new --out")
        with path.open("rb") as file:
            for number in range(part.first, part.first + part.count):
                name, sample = samples[number]
                yield _row(file, sample, f"{part.file:05d}-{number:07d}", name, path)


def _listing(path: Path) -> tuple[int, str]:
    samples, digest = _samples(path, path.stat().st_mtime_ns)
    if not samples:
        raise ValueError(f"{path}: holds no sample; wanted members such as 000000.jpg and 000000.txt")
    return len(samples), digest


@lru_cache(maxsize=2)  # the parts of one tar are read one after the other
def _samples(path: Path, changed_ns: int) -> tuple[list[tuple[str, Sample]], str]:
    """Samples by key in the order of their first members, from headers alone, and a hash of those. Raises: ValueError."""
    del changed_ns
    samples: dict[str, dict[str, Member]] = {}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for found in walk(file, path.stat().st_size):
            if isinstance(found, Damage):
                raise ValueError(f"{path}: at byte {found.offset}: {found.what}; wanted {found.wanted}; mend or leave out this tar")
            if found.name.startswith("/") or ".." in found.name.split("/"):
                raise ValueError(
                    f"{path}: member {found.name!r:.200} leads out of the folder that the tar would be unpacked to; leave it out"
                )
            digest.update(f"{found.name}\t{found.offset}\t{found.size}\n".encode("utf-8", "surrogateescape"))
            parts = _NAME.fullmatch(found.name)
            if parts is None:
                continue
            members = samples.setdefault(parts[1], {})
            extension = parts[2].lower()
            # one that comes twice makes the sample useless: nobody can say which members belong together
            members[extension if extension not in members else f"{extension} twice"] = found
    return list(samples.items()), digest.hexdigest()


def _row(file: BinaryIO, sample: Sample, key: str, name: str, path: Path) -> Row | UnreadableRow:
    where = f"{path}: sample {name!r:.200}"
    twice = next((extension for extension in sample if extension.endswith(" twice")), None)
    if twice is not None:
        return UnreadableRow(key, f"two members .{twice.removesuffix(' twice')} of one key", where)
    image = _image_extension(sample)
    if image is None:
        return UnreadableRow(key, f"no image among its members ({', '.join('.' + extension for extension in sample)[:200]})", where)
    try:
        content = _read(file, sample[image], image)
        mask = _read(file, sample[MASK_EXTENSION], MASK_EXTENSION) if MASK_EXTENSION in sample else None
        caption = next((_read(file, sample[text], "txt").decode().strip() for text in _TEXT_EXTENSIONS if text in sample), None)
        entries = json.loads(_read(file, sample[ATTRIBUTES_EXTENSION], ATTRIBUTES_EXTENSION)) if ATTRIBUTES_EXTENSION in sample else {}
    except (ValueError, RecursionError) as error:
        return UnreadableRow(key, str(error), where)
    if not isinstance(entries, dict):
        return UnreadableRow(key, "its .json is not an object", where)
    if caption is None:
        caption = next((text.strip() for entry in _TEXT_ENTRIES if isinstance(text := entries.get(entry), str)), None)
    attributes = entries.get("attributes")
    texts = {
        entry: value
        for entry, value in entries.items()
        if isinstance(value, str) and entry not in (*_TEXT_ENTRIES, "attributes") and len(value) <= _MAX_EXTRA_CHARACTERS
    }
    return Row(key, content, caption, _strings(attributes), {**texts, "key": name, "tar": path.name}, where, mask)


def _image_extension(sample: Sample) -> str | None:
    """The image's: `jpg` before `thumb.jpg`, in the order of the members; never the mask's."""
    plain = next((extension for extension in sample if extension in IMAGE_FORMATS), None)
    others = (extension for extension in sample if extension.rpartition(".")[2] in IMAGE_FORMATS and extension != MASK_EXTENSION)
    return plain or next(others, None)


def _read(file: BinaryIO, member: Member, extension: str) -> bytes:
    """Raises: ValueError if it is larger than its kind may be."""
    limit = member_limit_bytes(extension)
    if member.size > limit:
        raise ValueError(f"its .{extension} has {member.size} bytes, at most {limit} are allowed")
    file.seek(member.offset)
    return file.read(member.size)


def _strings(attributes: object) -> dict[str, str]:
    if not isinstance(attributes, dict):
        return {}
    return {str(name): value for name, value in attributes.items() if isinstance(value, str)}
