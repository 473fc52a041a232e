"""Packs a source into shuffled tars and their index; the same source and seed give the same bytes, however many workers."""

import errno
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from data_shards.config import DEFAULT_SAMPLES_PER_SHARD, INDEX_NAME
from data_shards.files import held, replace_file
from data_shards.index import ShardIndex, ShardIndexError, canonical_sha256, index_text
from data_shards.packing.assemble import Assembly, assemble, select
from data_shards.packing.filters import Filters
from data_shards.packing.fit import Crop, Fit, PackFormat
from data_shards.packing.pieces import NAMED_ROWS, Piece, PieceJob, kept_piece, load_piece
from data_shards.packing.prepare import Dedupe, Preparation
from data_shards.packing.workers import make_pieces
from data_shards.sources.rows import Part, RowSource

PARTIAL_NAME = ".pack"  # in OUT while it is packed: the wanted pack, a lock, the pieces, and an entry a finished shard
PART_ROWS = 256  # rows that are done again after a kill, at most, for each worker
READING, WRITING = "reading", "writing"
# (pass, samples done, total or None where nobody knows)
Progress = Callable[[str, int, int | None], None]

logger = logging.getLogger(__name__)


def pack(
    source: RowSource,
    out: str | Path,
    *,
    size: int | None,
    samples_per_shard: int = DEFAULT_SAMPLES_PER_SHARD,
    seed: int = 0,
    image_format: PackFormat = "png",
    crop: Crop | None = None,
    max_size: int | None = None,
    filters: Filters | None = None,
    dedupe: Dedupe = "off",
    first_rows: int | None = None,
    skip_bad_rows: bool = False,
    workers: int = 1,
    part_rows: int = PART_ROWS,
    progress: Progress | None = None,
) -> ShardIndex:
    """Writes the shards of `source` and, last of all, index.json; called again after an interruption it goes on.

    size: side of the images in pixels, None for each its own (max_size: shorter side at most); crop: by default centre where there is
    a size, else none; first_rows: how many rows to read, None for all; workers: processes (1 works in this one); part_rows: rows a
    worker reads and commits at a time; progress: called with the pass, rows or samples done, and their total.
    Needs room for the shards twice. A finished OUT is returned as it is.
    Raises: ValueError if OUT holds another pack, a row can't be packed (unless those are skipped) or none is left; RuntimeError if one
    is being written; OSError if the disk is full.
    """
    out = Path(out)
    numbers = {"size": size, "samples_per_shard": samples_per_shard, "first_rows": first_rows, "workers": workers, "part_rows": part_rows}
    if any(number is not None and number < 1 for number in numbers.values()):
        given = ", ".join(f"{name}={number}" for name, number in numbers.items() if number is not None)
        raise ValueError(f"{given} must each be at least 1")
    fit = Fit(size, image_format, crop or ("none" if size is None else "centre"), max_size)
    how = Preparation(fit, filters or Filters(), dedupe)
    wanted: dict[str, object] = {
        "source": source.describe(),
        "image_size": size,
        "pack": {"seed": seed, "samples_per_shard": samples_per_shard, **_stated(how, first_rows)},
    }
    report = progress or _no_progress
    finished = _finished(out, wanted)
    if finished is not None:
        _remove_partial(out)  # left behind by a kill between the last two lines below
        report(WRITING, finished.samples, finished.samples)
        return finished
    with held(out, PARTIAL_NAME, doing="packed"), _disk_errors_named(out):
        _start(out, wanted)
        job = PieceJob(source, how, skip_bad_rows, out / PARTIAL_NAME)
        pieces = _pieces(job, _parts(source, part_rows, first_rows), first_rows, workers, report)
        index = _assembled(out, wanted, source.licence(), pieces, samples_per_shard, seed, report)
    _remove_partial(out)
    return index


def _stated(how: Preparation, first_rows: int | None) -> dict[str, object]:
    """What is done to the rows, as the index says it; what is not done is not listed."""
    optional = {
        "max_size": how.fit.max_size,
        "filters": how.filters.to_json() or None,
        "dedupe": None if how.dedupe == "off" else how.dedupe,
        "first_rows": first_rows,
    }
    return {
        "image_format": how.fit.image_format,
        "crop": how.fit.crop,
        **{name: value for name, value in optional.items() if value is not None},
    }


def _parts(source: RowSource, part_rows: int, first_rows: int | None) -> list[Part]:
    """The parts of the first rows, or of all."""
    parts: list[Part] = []
    left = first_rows
    for part in source.parts(part_rows):
        if left is None:
            parts.append(part)
            continue
        if left == 0:
            break
        if part.count is None and parts:
            raise ValueError(f"first_rows={first_rows} can't be counted: this source does not know how many rows a file has; leave it out")
        parts.append(Part(part.file, part.first, left if part.count is None else min(left, part.count)))
        left -= parts[-1].count or 0
    return parts


def _pieces(job: PieceJob, parts: Sequence[Part], first_rows: int | None, workers: int, report: Progress) -> list[Piece]:
    """The first pass: a piece of every part, kept where a whole one is there already."""
    total = job.source.count if first_rows is None or job.source.count is None else min(first_rows, job.source.count)
    kept = {number: piece.rows for number, part in enumerate(parts) if (piece := kept_piece(job, number, part)) is not None}
    done = sum(kept.values())
    report(READING, done, total)
    todo = [(number, part) for number, part in enumerate(parts) if number not in kept]
    make_pieces(job, todo, workers, lambda rows: report(READING, done + rows, total))
    pieces: list[Piece] = []
    for number, part in enumerate(parts):
        piece = load_piece(job.folder, number)
        if piece is None or piece.part != part:
            raise RuntimeError(f"{job.folder}: piece {number} was lost after it was written; run the same command again")
        pieces.append(piece)
    _name_skipped(pieces)
    return pieces


def _assembled(
    out: Path,
    wanted: dict[str, object],
    licence: dict[str, object],
    pieces: Sequence[Piece],
    samples_per_shard: int,
    seed: int,
    report: Progress,
) -> ShardIndex:
    """The second pass, and the index."""
    selection = select(pieces)
    if not selection.count:
        why = ", ".join(f"{reason} {count}" for reason, count in selection.dropped.items()) or "the source has none"
        raise ValueError(f"{out}: no row is left to pack ({why}); loosen the filters, or look at the source")
    size, source, how = wanted["image_size"], wanted["source"], wanted["pack"]
    assert (size is None or isinstance(size, int)) and isinstance(source, dict) and isinstance(how, dict), "as pack() wrote it"
    work = Assembly(out, out / PARTIAL_NAME, pieces, selection, samples_per_shard, list_sizes=size is None)
    shards = assemble(work, seed, lambda done, total: report(WRITING, done, total))
    result = {**how, "dropped": selection.dropped} if selection.dropped else how
    text = index_text(image_size=size, licence=licence, source=source, pack=result, shards=shards)
    replace_file(out / INDEX_NAME, text.encode())
    return ShardIndex.load(out)


def _name_skipped(pieces: Sequence[Piece]) -> None:
    count = sum(piece.dropped.get("unreadable", 0) for piece in pieces)
    if count:
        named = [name for piece in pieces for name in piece.unreadable][:NAMED_ROWS]
        more = f"\n... and {count - len(named)} more" if count > len(named) else ""
        logger.warning("%d rows can't be packed and are left out:\n%s%s", count, "\n".join(named), more)


def _finished(out: Path, wanted: dict[str, object]) -> ShardIndex | None:
    """The index of an OUT that is packed already, and as wanted; sizes are compared here, bytes by `shards verify`."""
    if not (out / INDEX_NAME).exists():
        return None
    index = ShardIndex.load(out)
    how = {name: value for name, value in index.pack.items() if name != "dropped"}
    found = {"source": index.source, "image_size": index.image_size, "pack": how}
    if canonical_sha256(found) != canonical_sha256(wanted):
        raise ValueError(f"{out} holds other shards ({_difference(found, wanted)}); remove that folder, or give another one")
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
        nothing_yet = {path.name for path in (*out.iterdir(), *(out / PARTIAL_NAME).iterdir())} <= {PARTIAL_NAME, "wanted.json", "lock"}
        if canonical_sha256(found) != canonical_sha256(wanted) and nothing_yet:  # the source was mended before anything came of it
            replace_file(note, json.dumps(wanted, sort_keys=True, indent=1).encode())
        elif canonical_sha256(found) != canonical_sha256(wanted):
            raise ValueError(
                f"{out} holds the beginning of another pack ({_difference(found, wanted)}); remove that folder, or give another one"
            )
    else:
        strangers = sorted(path.name for path in out.iterdir() if path.name != PARTIAL_NAME)
        if strangers:
            raise ValueError(f"{out} is not empty (it holds {strangers[0]}); give another --out")
        replace_file(note, json.dumps(wanted, sort_keys=True, indent=1).encode())
    for left in (*out.glob("*.tmp"), *(out / PARTIAL_NAME).glob("*.tmp")):
        left.unlink(missing_ok=True)


@contextmanager
def _disk_errors_named(out: Path) -> Iterator[None]:
    """Says of a full disk where it is, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        what = f"{os.strerror(error.errno)}; packing needs room for the shards twice: make room and run the same command again, it goes on"
        raise OSError(error.errno, what, str(out)) from error


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


def _no_progress(_pass: str, _done: int, _total: int | None) -> None:
    return
