"""The index of a folder of shards: which sample lies where, checked strictly, and its identity."""

from __future__ import annotations  # array[int] is subscriptable from 3.12 on

import hashlib
import json
import re
from array import array
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import cast, final

from data_shards.config import ALLOWED_EXTENSIONS, INDEX_NAME, INDEX_SCHEMA_VERSION, MAX_IMAGE_PIXELS, member_limit_bytes

Json = Mapping[str, object]
SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*\.tar")
KEY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


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
    """One tar: its name, size, hash and samples in order."""

    name: str
    size_bytes: int
    sha256: str
    keys: tuple[str, ...]
    members: Mapping[str, Members]

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
        }


@final
@dataclass(frozen=True)
class ShardIndex:
    """Everything known of a folder of shards without opening one.

    image_size: side of every image in pixels; sha256: the data's identity; licence: name, url, creators, text.
    """

    root: Path
    image_size: int
    licence: Json
    source: Json
    pack: Json
    shards: tuple[Shard, ...]
    sha256: str

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
            raise ShardIndexError(f"{path}: there is no index; make the shards with `halfstep shards pack --out {root}`") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ShardIndexError(f"{path}: not valid JSON ({error}); {_MEND}") from None
        return _parse(content, root, path)

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
    """sha256 of an index without its own `sha256` entry, as compact JSON with sorted keys."""
    body = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def index_text(*, image_size: int, licence: Json, source: Json, pack: Json, shards: list[Shard]) -> str:
    """The text of index.json: a readable head, then one line a shard."""
    head: dict[str, object] = {
        "schema_version": INDEX_SCHEMA_VERSION,
        "samples": sum(shard.samples for shard in shards),
        "image_size": image_size,
        "licence": licence,
        "source": source,
        "pack": pack,
    }
    rows = [shard.to_json() for shard in shards]
    head["sha256"] = canonical_sha256({**head, "shards": rows})
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    return json.dumps(head, indent=1)[:-2] + ',\n "shards": [\n' + lines + "\n]}\n"


def is_safe_member_name(name: str) -> bool:
    """Whether a member name stays inside the folder it would be unpacked to, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and not set(name) & set('\\:*?"<>|') and name.isprintable()


def _parse(content: object, root: Path, path: Path) -> ShardIndex:
    index = _Entry(content, str(path))
    version = index.integer("schema_version")
    if version != INDEX_SCHEMA_VERSION:
        raise ShardIndexError(f"{path}: schema_version is {version}, this halfstep reads {INDEX_SCHEMA_VERSION}; {_MEND}")
    stored, counted = index.text("sha256"), canonical_sha256(index.content)
    if stored != counted:
        raise ShardIndexError(
            f"{path}: it was changed after it was written (sha256 says {stored[:12]}, its content {counted[:12]}); {_MEND}"
        )
    shards = tuple(_shard(_Entry(row, f"{path}: shards[{i}]")) for i, row in enumerate(index.items("shards")))
    image_size = index.integer("image_size", low=1)
    if image_size**2 > MAX_IMAGE_PIXELS:
        raise ShardIndexError(f"{path}: image_size is {image_size}, at most {int(MAX_IMAGE_PIXELS**0.5)} is allowed; {_MEND}")
    names = [shard.name for shard in shards]
    if len(set(names)) < len(names):
        raise ShardIndexError(f"{path}: two shards have one name; {_MEND}")
    found, samples = sum(shard.samples for shard in shards), index.integer("samples", low=1)
    if found != samples:
        raise ShardIndexError(f"{path}: samples is {samples}, but the shards list {found}; {_MEND}")
    return ShardIndex(
        root=root,
        image_size=image_size,
        licence=index.mapping("licence"),
        source=index.mapping("source"),
        pack=index.mapping("pack"),
        shards=shards,
        sha256=stored,
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
    bad = next((key for key in keys if not KEY.fullmatch(key)), None)
    if bad is not None or len(set(keys)) < len(keys):
        raise ShardIndexError(f"{row.where} ({name}): keys must be unique and of letters, digits, - and _, got {bad!r}; {_MEND}")
    if not keys:
        raise ShardIndexError(f"{row.where} ({name}): an empty shard; remove it by packing again into a new folder")
    members = {
        extension: _members(_Entry(entry, f"{row.where} ({name}): members.{extension}"), extension, len(keys), size_bytes)
        for extension, entry in row.mapping("members").items()
    }
    return Shard(name=name, size_bytes=size_bytes, sha256=row.text("sha256"), keys=keys, members=members)


def _members(entry: _Entry, extension: str, samples: int, size_bytes: int) -> Members:
    if extension not in ALLOWED_EXTENSIONS:
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
