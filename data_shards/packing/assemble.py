"""The second pass of a pack: the pieces' samples, without duplicates and in the seed's order, into shards."""

import json
import os
import zlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import final

import numpy as np

from data_shards.index import Shard, parse_shard
from data_shards.keyed import permutation
from data_shards.packing.pieces import Piece, piece_name, two_rows
from data_shards.packing.write import Block, TarWriter, commit_tar, is_whole, temporary_name
from data_shards.tars.tar import BLOCK_BYTES, padded

_OPEN_FILES = 128


@final
@dataclass(frozen=True)
class Selection:
    """The samples that are packed, in the order of the rows: piece and position in it; dropped: how many rows were left out, by reason."""

    pieces: np.ndarray
    positions: np.ndarray
    dropped: Mapping[str, int]

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.pieces)


@final
@dataclass(frozen=True)
class Assembly:
    """Where shards are made: into `out`, from the pieces in `partial`, where finished shards' entries lie too."""

    out: Path
    partial: Path
    pieces: Sequence[Piece]
    selection: Selection
    samples_per_shard: int
    list_sizes: bool


def select(pieces: Sequence[Piece]) -> Selection:
    """All samples but those whose sha256 an earlier row has.

    Raises: ValueError if two rows have one key.
    """
    dropped: Counter[str] = Counter()
    piece_numbers, positions = array("q"), array("q")
    seen: set[bytes] = set()
    keys: set[str] = set()
    for number, piece in enumerate(pieces):
        dropped.update(piece.dropped)
        for position, (key, sha256) in enumerate(zip(piece.shard.keys if piece.shard else (), piece.sha256s, strict=True)):
            if key in keys:
                raise ValueError(two_rows(key))
            keys.add(key)
            if sha256:
                digest = bytes.fromhex(sha256)
                if digest in seen:
                    dropped["duplicate"] += 1
                    continue
                seen.add(digest)
            piece_numbers.append(number)
            positions.append(position)
    return Selection(np.asarray(piece_numbers), np.asarray(positions), dict(sorted(dropped.items())))


def assemble(work: Assembly, seed: int, report: Callable[[int, int], None]) -> list[Shard]:
    """Every shard's entry, in order: kept where a whole one is there already, else written. report: called with samples done, total.

    Raises: RuntimeError if a piece was damaged since it was made.
    """
    order = permutation(work.selection.count, seed, "pack")
    shards: list[Shard] = []
    done = 0
    report(0, len(order))
    with closing(_PieceReader(work)) as reader:
        for number, first in enumerate(range(0, len(order), work.samples_per_shard)):
            wanted = order[first : first + work.samples_per_shard]
            path = work.out / f"shard-{number:06d}.tar"
            entry_path = work.partial / f"{path.name}.json"
            shard = _kept(path, entry_path, len(wanted))
            if shard is None:
                shard = _write(reader, wanted, path, entry_path, work.list_sizes)
            shards.append(shard)
            done += len(wanted)
            report(done, len(order))
    return shards


def _write(reader: "_PieceReader", wanted: np.ndarray, path: Path, entry_path: Path, list_sizes: bool) -> Shard:
    with temporary_name(path).open("wb") as file:
        writer = TarWriter(file, path.name)
        for place in wanted:
            key, blocks, size = reader.sample(int(place))
            writer.add(key, blocks, size if list_sizes else None)
        shard = writer.close()
        commit_tar(file, path, entry_path, shard.to_json())
    return shard


def _kept(path: Path, entry_path: Path, samples: int) -> Shard | None:
    """The entry of a shard that an earlier attempt finished, if its tar still has the right bytes."""
    try:
        shard = parse_shard(json.loads(entry_path.read_bytes()), str(entry_path))
    except (OSError, ValueError):
        return None  # written whole or not at all, so a damaged entry is a damaged disk: make the shard again
    return shard if shard.samples == samples and is_whole(path, shard) else None


@final
class _PieceReader:
    """Samples of the pieces by their place in the selection; holds the files that were used last."""

    def __init__(self, work: Assembly) -> None:
        self._work = work
        self._files: OrderedDict[int, FileIO] = OrderedDict()

    def sample(self, place: int) -> tuple[str, list[Block], tuple[int, int]]:
        """Key, members and image size of a sample, each member compared with its crc32."""
        number, position = int(self._work.selection.pieces[place]), int(self._work.selection.positions[place])
        shard = self._work.pieces[number].shard
        assert shard is not None and shard.widths is not None and shard.heights is not None, "a selected sample lies in a piece's tar"
        file = self._file(number)
        found = sorted(
            (members.offsets[position], members.sizes[position], members.crc32[position], extension)
            for extension, members in shard.members.items()
            if members.sizes[position] >= 0
        )
        blocks: list[Block] = []
        for offset, size, crc32, extension in found:
            written = os.pread(file.fileno(), BLOCK_BYTES + padded(size), offset - BLOCK_BYTES)
            if zlib.crc32(written) != crc32:
                path = self._work.partial / piece_name(number)
                raise RuntimeError(f"{path}: sample {shard.keys[position]!r} was changed since it was written; run the same command again")
            blocks.append(Block(extension, size, written))
        return shard.keys[position], blocks, (shard.widths[position], shard.heights[position])

    def _file(self, number: int) -> FileIO:
        file = self._files.get(number)
        if file is None:
            if len(self._files) >= _OPEN_FILES:
                self._files.popitem(last=False)[1].close()
            file = self._files[number] = FileIO(self._work.partial / piece_name(number))
        else:
            self._files.move_to_end(number)
        return file

    def close(self) -> None:
        """Closes all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()
