"""Makes the index of WebDataset tars that others wrote: each is walked once, in a confined process, and none is trusted or changed."""

import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from data_shards.config import INDEX_NAME
from data_shards.files import held, replace_file
from data_shards.index import Members, Shard, ShardIndex, ShardIndexError, index_text, parse_shard
from data_shards.remote.fetch import fetch
from data_shards.tars.confined import ConfinedError, Limits, confined_lines
from data_shards.tars.places import TarSource, TarSources, find_tars
from data_shards.tars.samples import NAMED

PARTIAL_NAME = ".index"  # in OUT while it is made: a lock, an entry a finished tar, and tars that are being fetched
MEMORY_BYTES = 2**28
OUTPUT_BYTES = 2**27
SLOWEST_HASH_BYTES = 20 * 2**20  # a second of processor time
SLOWEST_DISK_BYTES = 2 * 2**20  # a second
SHOWN_REFUSALS = 20
_MODULE = "data_shards.tars.samples"
Progress = Callable[[int, int], None]


class TarsError(ValueError):
    """Tars that can't be indexed, each with its reason; what was found of the others is kept for the next try."""


@final
@dataclass(frozen=True)
class IndexedTars:
    """The index, and what of the tars is not in it.

    ignored: members by extension; examples: one of each. left_out: members and samples by reason; named: the first of them.
    """

    index: ShardIndex
    ignored: Mapping[str, int]
    examples: Mapping[str, str]
    left_out: Mapping[str, int]
    named: tuple[str, ...]


@final
@dataclass(frozen=True)
class TarEntry:
    """What one tar holds; stamp: tells whether it is still the same file."""

    stamp: str
    shard: Shard
    ignored: Mapping[str, int]
    examples: Mapping[str, str]
    left_out: Mapping[str, int]
    named: tuple[str, ...]


def index_tars(
    tars: Sequence[str], out: str | Path, *, licence: str = "not stated", workers: int = 1, progress: Progress | None = None
) -> IndexedTars:
    """Writes OUT/index.json for tars of one folder or URL; called again after an interruption it goes on.

    tars: as `find_tars`. workers: tars that are read, or fetched, at a time. progress: called with tars done, total.
    Raises: TarsError naming every tar that is refused; ValueError if OUT holds another index; RuntimeError if one is being written or a
    store does not answer.
    """
    sources, out = find_tars(tars), Path(out)
    _check_own(out)
    with held(out, PARTIAL_NAME, doing="indexed"):
        found = _entries(sources, out, workers, progress or _no_progress)
        _write(out, _text(sources, found, out, licence))
        index = ShardIndex.load(out)
        for path in (out / PARTIAL_NAME).iterdir():
            path.unlink()
        (out / PARTIAL_NAME).rmdir()
    named = [f"{entry.shard.name}: {line}" for entry in found for line in entry.named]
    examples = {extension: f"{entry.shard.name}: {name}" for entry in reversed(found) for extension, name in entry.examples.items()}
    return IndexedTars(index, _sum(found, "ignored"), examples, _sum(found, "left_out"), tuple(named[:NAMED]))


def _check_own(out: Path) -> None:
    """Raises: ValueError if OUT is a folder of other things than tars and their index."""
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if names and not {INDEX_NAME, PARTIAL_NAME} & set(names) and not any(name.endswith(".tar") for name in names):
        raise ValueError(f"{out} is not empty (it holds {names[0]}); give a new --out, or the folder of the tars")


def tar_entry(path: Path, name: str) -> TarEntry:
    """What a tar holds, found by a process that may do nothing but read it.

    Raises: ConfinedError naming the member that makes it refused, or the limit that it went beyond; OSError if it can't be read.
    """
    with path.open("rb", buffering=0) as file:
        size = file.seek(0, 2)
        stamp = f"{size} {path.stat().st_mtime_ns}"
        file.seek(0)
        limits = Limits(MEMORY_BYTES, 10 + size // SLOWEST_HASH_BYTES, 60 + size // SLOWEST_DISK_BYTES, OUTPUT_BYTES)
        rows = confined_lines(_MODULE, file, limits)
        return _entry(rows, name, stamp)


def _entry(rows: Iterator[dict[str, object]], name: str, stamp: str) -> TarEntry:
    """A shard's entry from its rows, checked as strictly as one that is read from a file."""
    keys: list[str] = []
    sizes: list[list[int]] = []
    places: dict[str, list[list[int]]] = {}
    last: dict[str, object] = {}
    for row in rows:
        if "done" in row:
            last = row
            continue
        keys.append(str(row["key"]))
        sizes.append(_numbers(row["size"], 2))
        members = row["members"]
        assert isinstance(members, dict), "written by tar_samples"
        for extension, place in members.items():
            columns = places.setdefault(str(extension), [])
            columns.extend([[-1, -1, -1]] * (len(keys) - 1 - len(columns)))
            columns.append(_numbers(place, 3))
    shard = Shard(
        name=name,
        size_bytes=_numbers([last["done"]], 1)[0],
        sha256=str(last["sha256"]),
        keys=tuple(keys),
        members={extension: _members(columns, len(keys)) for extension, columns in places.items()},
        widths=array("q", [width for width, _ in sizes]),
        heights=array("q", [height for _, height in sizes]),
    )
    checked = parse_shard(shard.to_json(), name)
    return _report(stamp, checked, last)


def _report(stamp: str, shard: Shard, report: Mapping[str, object]) -> TarEntry:
    """An entry from the parts that tar_samples.Report has. Raises: LookupError, ConfinedError."""
    examples, named = report["examples"], report["named"]
    if not isinstance(examples, dict) or not isinstance(named, list):
        raise ConfinedError(f"the process that read it wrote {examples!r:.60} and {named!r:.60}, wanted names")
    shown = {str(extension): str(name) for extension, name in examples.items()}
    return TarEntry(stamp, shard, _counts(report["ignored"]), shown, _counts(report["left_out"]), tuple(map(str, named[:NAMED])))


def _members(columns: list[list[int]], samples: int) -> Members:
    rows = columns + [[-1, -1, -1]] * (samples - len(columns))
    return Members(*(array("q", [row[i] for row in rows]) for i in range(3)))


def _numbers(value: object, count: int) -> list[int]:
    if not isinstance(value, list) or len(value) != count or not all(type(number) is int for number in value):
        raise ConfinedError(f"the process that read it wrote {value!r:.60}, wanted {count} numbers")
    return value


def _counts(value: object) -> dict[str, int]:
    if not isinstance(value, dict):
        raise ConfinedError(f"the process that read it wrote {value!r:.60}, wanted counts")
    return {str(key): _numbers([count], 1)[0] for key, count in value.items()}


def _entries(sources: TarSources, out: Path, workers: int, progress: Progress) -> list[TarEntry]:
    """Every tar's entry, in order. Raises: TarsError after all have been tried; RuntimeError at the first that a store does not give."""
    kept = {source.name: entry for source in sources.tars if (entry := _kept(source, out)) is not None}
    todo = [source for source in sources.tars if source.name not in kept]
    total, refused = len(sources.tars), {}
    progress(len(kept), total)
    with ThreadPoolExecutor(workers) as pool:  # threads: each one waits for a process of its own
        running = {pool.submit(_make_entry, source, out): source for source in todo}
        try:
            for number, future in enumerate(as_completed(running)):
                source = running[future]
                try:
                    kept[source.name] = future.result()
                except (ConfinedError, ShardIndexError, PermissionError) as error:
                    refused[str(source.location)] = str(error)
                progress(total - len(todo) + number + 1, total)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if refused:
        lines = [f"{location}: {reason}" for location, reason in sorted(refused.items())]
        more = [f"... and {len(lines) - SHOWN_REFUSALS} more"] if len(lines) > SHOWN_REFUSALS else []
        raise TarsError(
            "\n".join([*lines[:SHOWN_REFUSALS], *more])
            + f"\n{len(refused)} of {total} tars can't be indexed; mend them or leave them out, and give the command again: "
            "what was found of the others is kept"
        )
    return [kept[source.name] for source in sources.tars]


def _make_entry(source: TarSource, out: Path) -> TarEntry:
    """Reads a tar, fetching it first if it lies afar, and notes what it holds."""
    if source.location.is_remote:
        path = out / PARTIAL_NAME / source.name
        fetch(source.location, path, size_bytes=None, sha256=None)
        try:
            entry = replace(tar_entry(path, source.name), stamp=source.location.identity)
        finally:
            path.unlink(missing_ok=True)
    else:
        entry = tar_entry(source.location.path, source.name)
    replace_file(out / PARTIAL_NAME / f"{source.name}.json", json.dumps({**vars(entry), "shard": entry.shard.to_json()}))
    return entry


def _kept(source: TarSource, out: Path) -> TarEntry | None:
    """What an earlier attempt found, if the tar has not changed since: by its size and time, or by its URL."""
    path = out / PARTIAL_NAME / f"{source.name}.json"
    try:
        note = json.loads(path.read_bytes())
        if source.location.is_remote:
            stamp = source.location.identity
        else:
            status = source.location.path.stat()
            stamp = f"{status.st_size} {status.st_mtime_ns}"
        if note["stamp"] != stamp:
            return None
        return _report(stamp, parse_shard(note["shard"], str(path)), note)
    except (OSError, ValueError, LookupError, TypeError):
        return None  # none yet, or a damaged disk: read the tar again


def _text(sources: TarSources, entries: Sequence[TarEntry], out: Path, licence: str) -> str:
    """The index of all tars; sizes stand once if all images are squares of one size, else with each sample."""
    sizes = {size for entry in entries for size in _sizes(entry.shard)}
    first = next(iter(sizes))
    image_size = first[0] if len(sizes) == 1 and first[0] == first[1] else None
    shards = [entry.shard if image_size is None else replace(entry.shard, widths=None, heights=None) for entry in entries]
    local = not sources.parent.is_remote
    beside = local and sources.parent.path == out.resolve()
    name = str(sources.parent).rstrip("/").rpartition("/")[2]
    return index_text(
        image_size=image_size,
        licence={"name": licence, "url": None, "creators": [], "attribution_required": None, "text": None},
        source={"kind": "tars", "name": name, "count": sum(shard.samples for shard in shards)},
        pack={"indexed": True, "ignored": _sum(entries, "ignored"), "left_out": _sum(entries, "left_out")},
        shards=shards,
        location=None if beside else sources.parent.secret_text,
    )


def _sizes(shard: Shard) -> Iterator[tuple[int, int]]:
    assert shard.widths is not None and shard.heights is not None, "every entry has them"
    return zip(shard.widths, shard.heights, strict=True)


def _sum(entries: Sequence[TarEntry], what: str) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for entry in entries:
        counts.update(entry.ignored if what == "ignored" else entry.left_out)
    return dict(sorted(counts.items()))


def _write(out: Path, text: str) -> None:
    """Puts the index in place. Raises: ValueError if OUT has the index of other shards."""
    if (out / INDEX_NAME).exists():
        found, wanted = ShardIndex.load(out), ShardIndex.parse(text, out, where="the new index")
        if found.sha256 != wanted.sha256 or found.location != wanted.location:
            raise ValueError(
                f"{out / INDEX_NAME} is the index of other shards, or of these before they changed; remove it, or give another --out"
            )
    replace_file(out / INDEX_NAME, text)


def _no_progress(_done: int, _total: int) -> None:
    return
