"""The index of a folder of shards: which sample lies where, checked strictly, and its identity."""

from __future__ import annotations  # array[int] is subscriptable from 3.12 on

import hashlib
import json
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import cast, final

from data_shards.config import (
    ALLOWED_EXTENSIONS,
    INDEX_NAME,
    INDEX_SCHEMA_VERSION,
    MAX_IMAGE_PIXELS,
    READABLE_SCHEMA_VERSIONS,
    is_allowed_extension,
    is_image,
    member_limit_bytes,
)

Json = Mapping[str, object]
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
MAX_KEY_CHARACTERS = 255


class ShardIndexError(ValueError):
    """An index.json that can't be trusted; says what, where, what was wanted and how to mend it."""


@final
@dataclass(frozen=True)
class Members:
    """Where one extension's members lie in a shard, by sample position; a size of -1 says there is none.

    offsets: bytes from the start of the tar to the data; crc32: over header, data and padding.
    """

    offsets: array[int]
    sizes: array[int]
    crc32: array[int]


@final
@dataclass(frozen=True)
class Shard:
    """One tar: its name, size, hash and samples in order.

    widths, heights: of each sample's image in pixels; None where the index's image_size says it of all.
    """

    name: str
    size_bytes: int
    sha256: str
    keys: tuple[str, ...]
    members: Mapping[str, Members]
    widths: array[int] | None = None
    heights: array[int] | None = None

    @property
    def samples(self) -> int:
        """Number of samples in this shard."""
        return len(self.keys)

    def to_json(self) -> dict[str, object]:
        """The shard's entry in index.json."""
        return {
            "name": self.name,
            "bytes": self.size_bytes,
            "sha256": self.sha256,
            "keys": list(self.keys),
            "members": {
                extension: {"offsets": list(m.offsets), "sizes": list(m.sizes), "crc32": list(m.crc32)}
                for extension, m in sorted(self.members.items())
            },
            **({"widths": list(self.widths), "heights": list(self.heights)} if self.widths and self.heights else {}),
        }


@final
@dataclass(frozen=True)
class ShardIndex:
    """Everything known of a folder of shards without opening one.

    image_size: side of every image in pixels, None where they differ or there are none; sha256: the data's identity; licence: name,
    url, creators, text; derived: what captioners and encoders have made of the packed samples, oldest first; location: where the
    tars lie if not beside the index: a URL or a folder.
    """

    root: Path
    image_size: int | None
    licence: Json
    source: Json
    pack: Json
    shards: tuple[Shard, ...]
    sha256: str
    derived: tuple[Json, ...] = ()
    location: str | None = None

    @classmethod
    def load(cls, root: str | Path) -> ShardIndex:
        """Reads ROOT/index.json and nothing else.

        Raises: ShardIndexError if it is missing, not JSON, of another schema, inconsistent, or changed since it was written.
        """
        root = Path(root)
        path = root / INDEX_NAME
        try:
            content = json.loads(path.read_bytes())
        except FileNotFoundError:
            inside = sorted(str(found.parent) for found in root.glob(f"*/{INDEX_NAME}"))
            mend = f"give {' or '.join(inside)}" if inside else f"make the shards with `halfstep shards pack --out {root}`"
            raise ShardIndexError(f"{path}: there is no index; {mend}") from None
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ShardIndexError(f"{path}: not valid JSON ({error}); {_MEND}") from None
        return _parse(content, root, str(path))

    @classmethod
    def parse(cls, text: bytes | str, root: Path, *, where: str, location: str | None = None) -> ShardIndex:
        """An index from its text, for shards whose index lies elsewhere; location: where the tars lie, instead of what the text says.

        Raises: ShardIndexError as `load`, naming `where`.
        """
        try:
            content = json.loads(text)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise ShardIndexError(f"{where}: not valid JSON ({error}); {_MEND}") from None
        index = _parse(content, root, where)
        return index if location is None else replace(index, location=location)

    def side(self) -> int:
        """Side of every image in pixels; where encoders have kept none, that of the squares that they saw.

        Raises: ShardIndexError if they differ.
        """
        if self.image_size is None and not self.holds_images():
            for done in reversed(self.derived):
                if isinstance(size := done.get("size"), int):
                    return size
        if self.image_size is None:
            raise ShardIndexError(
                f"{self.root}: its images have several sizes; set data.image_size to the side in pixels that they are brought to"
            )
        return self.image_size

    def holds_images(self) -> bool:
        """Whether samples have images, not only what encoders made of them."""
        return any(is_image(extension) for shard in self.shards for extension in shard.members)

    def size_at(self, shard: Shard, position: int) -> tuple[int, int]:
        """Width and height in pixels of a sample's image as it is stored.

        Raises: ShardIndexError if the index does not say.
        """
        if shard.widths is not None and shard.heights is not None:
            return shard.widths[position], shard.heights[position]
        if self.image_size is None:
            raise ShardIndexError(f"{self.root}: the index does not say how large the images of {shard.name} are; {_MEND}")
        return self.image_size, self.image_size

    @property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)

    @property
    def samples_per_shard(self) -> tuple[int, ...]:
        """Samples of each shard, in shard order."""
        return tuple(shard.samples for shard in self.shards)


_MEND = "restore it from a copy, or pack the shards again into a new folder"


def canonical_sha256(content: Json) -> str:
    """sha256 of an index without its own `sha256` and where its tars lie, as compact JSON with sorted keys."""
    body = {key: value for key, value in content.items() if key not in ("sha256", "location")}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def index_text(
    *,
    image_size: int | None,
    licence: Json,
    source: Json,
    pack: Json,
    shards: Sequence[Shard],
    derived: Sequence[Json] = (),
    location: str | None = None,
) -> str:
    """The text of index.json: a readable head, then one line a shard."""
    head: dict[str, object] = {
        "schema_version": INDEX_SCHEMA_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "image_size": image_size,
        "licence": licence,
        "source": source,
        "pack": pack,
        "derived": list(derived),
    }
    rows = [shard.to_json() for shard in shards]
    head["sha256"] = canonical_sha256({**head, "shards": rows})
    if location is not None:
        head["location"] = location
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n' + lines + "\n]}\n"


def is_safe_member_name(name: str) -> bool:
    """Whether a member name stays inside the folder it would be unpacked to, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & set('\\:*?"<>|') and name.isprintable()


def is_key(key: str) -> bool:
    """Whether a sample may be called so: a safe path of at most 255 characters whose last part has no dot, as WebDataset wants it."""
    return 0 < len(key) <= MAX_KEY_CHARACTERS and "." not in key.rpartition("/")[2] and not key.endswith("/") and is_safe_member_name(key)


def _parse(content: object, root: Path, where: str) -> ShardIndex:
    index = _Entry(content, where)
    version = index.integer("schema_version")
    if version not in READABLE_SCHEMA_VERSIONS:
        raise ShardIndexError(f"{where}: schema_version is {version}, this halfstep reads {INDEX_SCHEMA_VERSION}; {_MEND}")
    stored, counted = index.text("sha256"), canonical_sha256(index.content)
    if stored != counted:
        raise ShardIndexError(
            f"{where}: it was changed after it was written (sha256 says {stored[:12]}, its content {counted[:12]}); {_MEND}"
        )
    shards = tuple(_shard(_Entry(row, f"{where}: shards[{i}]")) for i, row in enumerate(index.items("shards")))
    image_size = None if index.content.get("image_size") is None and version > 1 else index.integer("image_size", low=1)
    if image_size is not None and image_size**2 > MAX_IMAGE_PIXELS:
        raise ShardIndexError(f"{where}: image_size is {image_size}, at most {int(MAX_IMAGE_PIXELS**0.5)} is allowed; {_MEND}")
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise ShardIndexError(f"{where}: two shards have one name; {_MEND}")
    found, samples = sum(shard.samples for shard in shards), index.integer("samples", low=1)
    if found != samples:
        raise ShardIndexError(f"{where}: samples is {samples}, but the shards list {found}; {_MEND}")
    derived = index.items("derived") if version > 1 else []
    return ShardIndex(
        root=root,
        image_size=image_size,
        licence=index.mapping("licence"),
        source=index.mapping("source"),
        pack=index.mapping("pack"),
        shards=shards,
        sha256=stored,
        derived=tuple(_Entry(entry, f"{where}: derived[{i}]").content for i, entry in enumerate(derived)),
        location=index.text("location") if "location" in index.content else None,
    )


def parse_shard(content: object, where: str) -> Shard:
    """A shard's entry as `Shard.to_json` wrote it.

    Raises: ShardIndexError at the first entry that is missing, of another type or out of range.
    """
    return _shard(_Entry(content, where))


def _shard(row: _Entry) -> Shard:
    name, size_bytes = row.text("name"), row.integer("bytes")
    if not SHARD_NAME.fullmatch(name):
        raise ShardIndexError(f"{row.where}: name is {name!r}, wanted a plain file name such as shard-000000.tar; {_MEND}")
    keys = tuple(str(key) for key in row.items("keys"))
    bad = next((key for key in keys if not is_key(key)), None)
    if bad is not None or len(set(keys)) < len(keys):
        got = "one twice" if bad is None else repr(bad)
        raise ShardIndexError(f"{row.where} ({name}): keys must be unique safe paths without a dot in the last part, got {got}; {_MEND}")
    if not keys:
        raise ShardIndexError(f"{row.where} ({name}): an empty shard; remove it by packing again into a new folder")
    members = {
        extension: _members(_Entry(entry, f"{row.where} ({name}): members.{extension}"), extension, len(keys), size_bytes)
        for extension, entry in row.mapping("members").items()
    }
    widths, heights = (_pixels(row, side, len(keys)) for side in ("widths", "heights"))
    if (widths is None) != (heights is None):
        raise ShardIndexError(f"{row.where} ({name}): widths and heights come together; {_MEND}")
    return Shard(name=name, size_bytes=size_bytes, sha256=row.text("sha256"), keys=keys, members=members, widths=widths, heights=heights)


def _pixels(row: _Entry, side: str, samples: int) -> array[int] | None:
    """A shard's widths or heights, None if it lists none."""
    if side not in row.content:
        return None
    pixels = row.integers(side)
    if len(pixels) != samples or not all(1 <= count <= MAX_IMAGE_PIXELS for count in pixels):
        raise ShardIndexError(f"{row.where}: {side} lists {len(pixels)} entries, wanted {samples} from 1 to {MAX_IMAGE_PIXELS}; {_MEND}")
    return pixels


def _members(entry: _Entry, extension: str, samples: int, size_bytes: int) -> Members:
    if not is_allowed_extension(extension):
        raise ShardIndexError(f"{entry.where}: extension .{extension} is not allowed, only {', '.join(ALLOWED_EXTENSIONS)}; {_MEND}")
    offsets, sizes, crc32 = (entry.integers(key) for key in ("offsets", "sizes", "crc32"))
    if not len(offsets) == len(sizes) == len(crc32) == samples:
        raise ShardIndexError(f"{entry.where}: lists of {len(offsets)}, {len(sizes)} and {len(crc32)} entries, wanted {samples}; {_MEND}")
    limit = member_limit_bytes(extension)
    for position, (offset, size) in enumerate(zip(offsets, sizes, strict=True)):
        if size != -1 and not (offset >= 512 and 0 <= size <= limit and offset + size <= size_bytes):
            raise ShardIndexError(
                f"{entry.where}[{position}]: offset {offset} and size {size} do not fit a shard of {size_bytes} bytes "
                f"and the limit of {limit} bytes for .{extension}; {_MEND}"
            )
    return Members(offsets, sizes, crc32)


@final
class _Entry:
    """A JSON object read key by key, with the place to name in an error."""

    def __init__(self, content: object, where: str) -> None:
        if not isinstance(content, dict):
            raise ShardIndexError(f"{where}: wanted an object, got {type(content).__name__}; {_MEND}")
        self.content: dict[str, object] = content
        self.where = where

    def _get(self, key: str, kind: type[object]) -> object:
        value = self.content.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ShardIndexError(f"{self.where}: {key} is {value!r:.60}, wanted {kind.__name__}; {_MEND}")
        return value

    def integer(self, key: str, *, low: int = 0) -> int:
        value = self._get(key, int)
        assert isinstance(value, int), "_get checked the type"
        if value < low:
            raise ShardIndexError(f"{self.where}: {key} is {value}, wanted at least {low}; {_MEND}")
        return value

    def text(self, key: str) -> str:
        return str(self._get(key, str))

    def mapping(self, key: str) -> dict[str, object]:
        return _Entry(self._get(key, dict), f"{self.where}: {key}").content

    def items(self, key: str) -> list[object]:
        value = self._get(key, list)
        assert isinstance(value, list), "_get checked the type"
        return value

    def integers(self, key: str) -> array[int]:
        try:
            return array("q", cast("list[int]", self.items(key)))
        except (TypeError, OverflowError):
            raise ShardIndexError(f"{self.where}: {key} is not a list of whole numbers; {_MEND}") from None
