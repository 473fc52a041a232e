"""The first pass of a pack: each part of the source becomes one piece, a tar of samples in the order of the rows."""

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from data_shards.index import Shard, is_key, parse_shard
from data_shards.packing.filters import DropReason
from data_shards.packing.fit import image_warnings
from data_shards.packing.prepare import Preparation, Prepared, prepared
from data_shards.packing.write import TarWriter, commit_tar, is_whole, temporary_name
from data_shards.sources.rows import Part, RowSource, UnreadableRow

NAMED_ROWS = 20  # rows that can't be packed and are named, of a piece and in a message


@final
@dataclass(frozen=True)
class PieceJob:
    """What all pieces of a pack have in common; folder: where they are written."""

    source: RowSource
    how: Preparation
    skip_bad_rows: bool
    folder: Path


@final
@dataclass(frozen=True)
class Piece:
    """A finished piece: its tar (None where no row was kept), what `dedupe` compares of each sample, and what was left out.

    unreadable: the first rows that could not be read, for people.
    """

    part: Part
    rows: int
    dropped: Mapping[str, int]
    unreadable: tuple[str, ...]
    shard: Shard | None
    sha256s: tuple[str, ...]


class BadRowsError(ValueError):
    """Rows that can't be packed, under the policy `stop`."""

    def __init__(self, named: list[str], count: int) -> None:
        noun = "row" if count == 1 else "rows"
        more = [f"... and {count - len(named)} more"] if count > len(named) else []
        head = f"{count} {noun} can't be packed; mend or remove them, or go on without such (--on-bad-row skip):"
        super().__init__("\n".join([head, *named, *more]))
        self.named = named
        self.count = count

    def __reduce__(self) -> tuple[type["BadRowsError"], tuple[list[str], int]]:
        """Lets a worker process hand it on whole."""
        return BadRowsError, (self.named, self.count)


def two_rows(key: str) -> str:
    """What to say of a key that comes twice."""
    return f"two rows are called {key!r}; the source must give each a key of its own"


def piece_name(number: int) -> str:
    """File name of piece `number`'s tar."""
    return f"piece-{number:06d}.tar"


def make_piece(job: PieceJob, number: int, part: Part, tick: Callable[[], None]) -> None:
    """Reads, prepares and commits one part; tick: called after each row, may raise to stop.

    Raises: BadRowsError naming the part's rows that can't be packed, if those are not to be skipped; ValueError or OSError if the
    part can't be read or written.
    """
    path = job.folder / piece_name(number)
    temporary = temporary_name(path)
    dropped: Counter[DropReason] = Counter()
    unreadable: list[str] = []
    sha256s: list[str] = []
    keys: set[str] = set()
    rows = 0
    with temporary.open("wb") as file, image_warnings():
        writer = TarWriter(file, path.name)
        for row in job.source.read(part, job.how.fit.size):
            sample = prepared(row, job.how)
            match sample:
                case Prepared() if not job.skip_bad_rows and dropped["unreadable"]:
                    pass  # nothing of this piece is kept: only the other bad rows are of interest
                case Prepared():
                    assert is_key(sample.key), f"source {job.source.describe()['kind']} names a row {sample.key!r}"
                    if sample.key in keys:
                        raise ValueError(two_rows(sample.key))
                    keys.add(sample.key)
                    writer.add(sample.key, sample.blocks, sample.size)
                    sha256s.append(sample.sha256)
                case UnreadableRow():
                    dropped["unreadable"] += 1
                    if len(unreadable) < NAMED_ROWS:
                        unreadable.append(f"{sample.where or sample.key}: {sample.reason}")
                case _:
                    dropped[sample] += 1
            rows += 1
            tick()
        if dropped["unreadable"] and not job.skip_bad_rows:
            file.close()
            temporary.unlink()
            raise BadRowsError(unreadable, dropped["unreadable"])
        shard = writer.close() if sha256s else None
        counts = {reason: count for reason, count in sorted(dropped.items()) if count}
        piece = Piece(part, rows, counts, tuple(unreadable), shard, tuple(sha256s))
        commit_tar(file, path, _entry_path(job.folder, number), _to_json(piece))


def kept_piece(job: PieceJob, number: int, part: Part) -> Piece | None:
    """What an earlier attempt finished of a part, if its tar still has the right bytes."""
    piece = load_piece(job.folder, number)
    if piece is None or piece.part != part or (piece.unreadable and not job.skip_bad_rows):
        return None
    if piece.shard is not None and not is_whole(job.folder / piece_name(number), piece.shard):
        return None
    return piece


def load_piece(folder: Path, number: int) -> Piece | None:
    """A piece's entry; None if there is none or a damaged one: it is written whole or not at all, so the disk is damaged."""
    path = _entry_path(folder, number)
    try:
        entry = json.loads(path.read_bytes())
        shard = None if entry["shard"] is None else parse_shard(entry["shard"], str(path))
        return Piece(Part(*entry["part"]), entry["rows"], entry["dropped"], tuple(entry["unreadable"]), shard, tuple(entry["sha256s"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _to_json(piece: Piece) -> dict[str, object]:
    return {
        "part": [piece.part.file, piece.part.first, piece.part.count],
        "rows": piece.rows,
        "dropped": piece.dropped,
        "unreadable": piece.unreadable,
        "shard": None if piece.shard is None else piece.shard.to_json(),
        "sha256s": piece.sha256s,
    }


def _entry_path(folder: Path, number: int) -> Path:
    return folder / f"{piece_name(number)}.json"
