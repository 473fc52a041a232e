"""Packs a source into shuffled tars and their index; the same source and seed give the same bytes, however many workers."""

import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from data_shards.config import (
    ATTRIBUTES_EXTENSION,
    CAPTION_EXTENSION,
    DEFAULT_SAMPLES_PER_SHARD,
    INDEX_NAME,
    ImageFormat,
)
from data_shards.files import fsync_directory, replace_file
from data_shards.images import encode_image
from data_shards.index import Members, Shard, ShardIndex, ShardIndexError, canonical_sha256, index_text, parse_shard
from data_shards.keyed import permutation
from data_shards.source import Source, SourceSample
from data_shards.tar import BLOCK_BYTES, end_bytes, member_bytes

PARTIAL_NAME = ".pack"  # in OUT while it is packed: the wanted pack, a lock, and an entry a finished shard
CHUNK_SAMPLES = 32  # samples a worker makes per task: about 0.1 s of faces
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PackedSample:
    """One sample as the members of its tar: (extension, content), in the order they are written."""

    key: str
    members: tuple[tuple[str, bytes], ...]


def pack(
    source: Source,
    out: str | Path,
    *,
    size: int,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    seed: int = 0,
    image_format: ImageFormat = "png",
    workers: int = 1,
    progress: Progress | None = None,
) -> ShardIndex:
    """Writes the shards of `source` and, last of all, index.json; called again after an interruption it goes on.

    size: side of the images in pixels; workers: processes (1 works in this one); progress: called with samples done, total.
    A finished OUT is returned as it is. Raises: ValueError if OUT holds another pack; RuntimeError if one is being written.
    """
    out = Path(out)
    if size < 1 or samples_per_shard < 1 or workers < 1:
        raise ValueError(f"size={size}, samples_per_shard={samples_per_shard} and workers={workers} must each be at least 1")
    how: dict[str, object] = {"seed": seed, "samples_per_shard": samples_per_shard, "image_format": image_format, "crop": "centre"}
    wanted: dict[str, object] = {"source": source.describe(), "image_size": size, "pack": how}
    report = progress or _no_progress
    finished = _finished(out, wanted)
    if finished is not None:
        _remove_partial(out)  # left behind by a kill between the last two lines below
        report(source.count, source.count)
        return finished
    with _locked(out):
        _start(out, wanted)
        order = permutation(source.count, seed, "pack").tolist()
        shards = _pack_shards(source, out, order, samples_per_shard, size, image_format, workers, report)
        text = index_text(image_size=size, licence=source.licence(), source=source.describe(), pack=how, shards=shards)
        replace_file(out / INDEX_NAME, text.encode())
    _remove_partial(out)
    return ShardIndex.load(out)


def shard_name(number: int) -> str:
    """File name of shard `number`."""
    return f"shard-{number:06d}.tar"


def packed_sample(sample: SourceSample, image_format: ImageFormat) -> PackedSample:
    """The members of a sample: its image, its caption if it has one, and always its attributes."""
    texts: dict[str, object] = {**sample.extra, "attributes": dict(sample.attributes)}
    members: list[tuple[str, bytes]] = [(image_format, encode_image(sample.image, image_format))]
    if sample.caption is not None:
        members.append((CAPTION_EXTENSION, sample.caption.encode()))
        texts["caption"] = sample.caption
    members.append((ATTRIBUTES_EXTENSION, json.dumps(texts, sort_keys=True).encode()))
    return PackedSample(sample.key, tuple(members))


def write_shard(file: BinaryIO, name: str, samples: Sequence[PackedSample]) -> Shard:
    """Writes one tar and returns its index entry."""
    extensions = sorted({extension for sample in samples for extension, _ in sample.members})
    members = {extension: Members(*(array("q", [-1]) * len(samples) for _ in range(3))) for extension in extensions}
    digest, offset = hashlib.sha256(), 0
    for position, sample in enumerate(samples):
        for extension, content in sample.members:
            written = member_bytes(f"{sample.key}.{extension}", content)
            members[extension].offsets[position] = offset + BLOCK_BYTES
            members[extension].sizes[position] = len(content)
            members[extension].crc32[position] = zlib.crc32(written)
            file.write(written)
            digest.update(written)
            offset += len(written)
    end = end_bytes(offset)
    file.write(end)
    digest.update(end)
    return Shard(name, offset + len(end), digest.hexdigest(), tuple(sample.key for sample in samples), members)


def _pack_shards(
    source: Source,
    out: Path,
    order: list[int],
    samples_per_shard: int,
    size: int,
    image_format: ImageFormat,
    workers: int,
    report: Progress,
) -> list[Shard]:
    """Every shard's entry, in order: kept where a whole one is there already, else written."""
    parts = [order[first : first + samples_per_shard] for first in range(0, len(order), samples_per_shard)]
    kept = {number: shard for number in range(len(parts)) if (shard := _kept(out, number, len(parts[number]))) is not None}
    todo = [number for number in range(len(parts)) if number not in kept]
    done = sum(shard.samples for shard in kept.values())
    report(done, len(order))
    chunks = [part[i : i + CHUNK_SAMPLES] for number in todo for part in (parts[number],) for i in range(0, len(part), CHUNK_SAMPLES)]
    made = _make(source, chunks, size, image_format, workers)
    written: dict[int, Shard] = {}
    for number in todo:
        samples: list[PackedSample] = []
        while len(samples) < len(parts[number]):
            chunk = next(made)
            samples += chunk
            done += len(chunk)
            report(done, len(order))
        written[number] = _commit_shard(out, number, samples)
    return [kept.get(number) or written[number] for number in range(len(parts))]


def _make(
    source: Source, chunks: Sequence[Sequence[int]], size: int, image_format: ImageFormat, workers: int
) -> Iterator[list[PackedSample]]:
    """The samples of each chunk, in the order of the chunks; with more than one worker, a few chunks ahead."""
    if workers == 1:
        yield from (make_samples(source, chunk, size, image_format) for chunk in chunks)
        return
    # spawn: a caller may hold threads and locks (torch, rich) that do not survive a fork
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        ahead: deque[Future[list[PackedSample]]] = deque()
        for chunk in chunks:
            ahead.append(pool.submit(make_samples, source, chunk, size, image_format))
            if len(ahead) > 4 * workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def make_samples(source: Source, numbers: Sequence[int], size: int, image_format: ImageFormat) -> list[PackedSample]:
    """What a worker process does: makes and encodes a chunk of samples."""
    return [packed_sample(source.sample(number, size), image_format) for number in numbers]


def _finished(out: Path, wanted: dict[str, object]) -> ShardIndex | None:
    """The index of an OUT that is packed already, and as wanted; sizes are compared here, bytes by `shards verify`."""
    if not (out / INDEX_NAME).exists():
        return None
    index = ShardIndex.load(out)
    found = {"source": index.source, "image_size": index.image_size, "pack": index.pack}
    if canonical_sha256(found) != canonical_sha256(wanted):
        raise ValueError(f"{out} holds other shards ({_difference(found, wanted)}); give another --out, or remove that folder")
    for shard in index.shards:
        path = out / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise ShardIndexError(
                f"{path} is missing or not of {shard.size_bytes} bytes; remove {out / INDEX_NAME} to pack what is missing"
            )
    return index


def _start(out: Path, wanted: dict[str, object]) -> None:
    """Notes what is packed here, or checks that an interrupted pack wanted the same; drops half-written files."""
    note = out / PARTIAL_NAME / "wanted.json"
    if note.exists():
        found = json.loads(note.read_text(encoding="utf-8"))
        if canonical_sha256(found) != canonical_sha256(wanted):
            raise ValueError(
                f"{out} holds the beginning of another pack ({_difference(found, wanted)}); give another --out, or remove that folder"
            )
    else:
        strangers = sorted(path.name for path in out.iterdir() if path.name != PARTIAL_NAME)
        if strangers:
            raise ValueError(f"{out} is not empty (it holds {strangers[0]}); give another --out")
        replace_file(note, json.dumps(wanted, sort_keys=True, indent=1).encode())
    for left in (*out.glob("*.tmp"), *(out / PARTIAL_NAME).glob("*.tmp")):
        left.unlink()


def _kept(out: Path, number: int, samples: int) -> Shard | None:
    """The entry of a shard that an earlier attempt finished, if its tar still has the right bytes."""
    entry, path = out / PARTIAL_NAME / f"{shard_name(number)}.json", out / shard_name(number)
    if not (entry.is_file() and path.is_file()):
        return None
    try:
        shard = parse_shard(json.loads(entry.read_text(encoding="utf-8")), str(entry))
    except ValueError:
        return None  # written whole or not at all, so a damaged entry is a damaged disk: make the shard again
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    return shard if whole and shard.samples == samples else None


def _commit_shard(out: Path, number: int, samples: Sequence[PackedSample]) -> Shard:
    """Writes one tar under a temporary name, then its name, then its entry."""
    path = out / shard_name(number)
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        shard = write_shard(file, path.name, samples)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    fsync_directory(out)
    replace_file(out / PARTIAL_NAME / f"{path.name}.json", json.dumps(shard.to_json()).encode())
    return shard


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Holds OUT for this process."""
    (out / PARTIAL_NAME).mkdir(parents=True, exist_ok=True)
    with (out / PARTIAL_NAME / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{out} is being packed by another process; wait for it, or give another --out") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP):  # some network file systems have no locks: go on without
                raise
        yield


def _remove_partial(out: Path) -> None:
    if not (out / PARTIAL_NAME).exists():
        return
    for path in (out / PARTIAL_NAME).iterdir():
        path.unlink()
    (out / PARTIAL_NAME).rmdir()


def _difference(found: dict[str, object], wanted: dict[str, object]) -> str:
    """The first entries that differ, as `seed is 0, wanted 1`."""
    one, other = _flat(found), _flat(wanted)
    names = [name for name in sorted(one | other) if one.get(name) != other.get(name)]
    return ", ".join(f"{name} is {one.get(name)}, wanted {other.get(name)}" for name in names[:3])


def _flat(entries: dict[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in entries.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _no_progress(_done: int, _total: int) -> None:
    return
