"""Parquet files as a source of rows: images as bytes in a column, captions in another, labels by their names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, final

from data_shards.config import MAX_IMAGE_BYTES
from data_shards.hub.columns import Column, Columns, choose_columns
from data_shards.sources.cells import caption_cell, image_cell
from data_shards.sources.folder import stated_licence
from data_shards.sources.rows import Part, Row, UnreadableRow, even_parts

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

_BATCH_ROWS = 32  # unpacked at a time
_READ_BYTES = 2**20
_FOOTER_BYTES = 8  # length of the footer, and the magic number


@final
@dataclass(frozen=True)
class ParquetSource:
    """The rows of Parquet files in the order in which they are given. Make one with `open`.

    row_groups: of each file the rows of each of its groups; footers_sha256: of each file's footer, which says where all lies in it.
    """

    files: tuple[Path, ...]
    row_groups: tuple[tuple[int, ...], ...]
    footers_sha256: tuple[str, ...]
    columns: Columns
    licence_name: str = "not stated"

    @classmethod
    def open(
        cls, files: Sequence[Path], *, image_column: str | None = None, text_column: str | None = None, licence: str = "not stated"
    ) -> ParquetSource:
        """Reads the footers; columns that are not named are chosen as for a data set of the Hub. text_column="": none.

        Raises: ValueError naming the file that is not Parquet, or of other columns than the first; the columns, if none or several fit.
        """
        if not files:
            raise ValueError("--source parquet wants files: halfstep shards pack --source parquet FILE.parquet... --out OUT")
        columns: Columns | None = None
        row_groups, footers = [], []
        for path in files:
            with _opened(path) as file:
                found = _columns(file)
                chosen = choose_columns(
                    found,
                    image=image_column if columns is None else columns.image,
                    text=text_column if columns is None else columns.text or "",
                    where=str(path),
                )
                columns = columns or chosen
                if chosen != columns:
                    raise ValueError(f"{path}: its label columns differ from those of {files[0]}; pack the files by themselves")
                row_groups.append(tuple(file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)))
            footers.append(_footer_sha256(path))
        assert columns is not None, "there is a file"
        return cls(tuple(files), tuple(row_groups), tuple(footers), columns, licence)

    @property
    def count(self) -> int:
        """Number of rows."""
        return sum(map(sum, self.row_groups))

    def describe(self) -> dict[str, object]:
        """The files' names and a hash of their footers; where they lie is not told."""
        listing = "\n".join(f"{path.name}\t{footer}" for path, footer in zip(self.files, self.footers_sha256, strict=True))
        return {
            "kind": "parquet",
            "name": self.files[0].stem if len(self.files) == 1 else f"{len(self.files)} files",
            "count": self.count,
            "image_column": self.columns.image,
            "text_column": self.columns.text,
            "label_columns": sorted(self.columns.labels),
            "listing_sha256": hashlib.sha256(listing.encode("utf-8", "surrogateescape")).hexdigest(),
        }

    def licence(self) -> dict[str, object]:
        """What the user stated."""
        return stated_licence(self.licence_name)

    def parts(self, rows: int) -> Sequence[Part]:
        """Whole row groups, about `rows` rows of them; a group of more than twice as many is read in several parts."""
        return [part for file, groups in enumerate(self.row_groups) for part in _parts(file, groups, rows)]

    def read(self, part: Part, size: int | None) -> Iterator[Row | UnreadableRow]:
        """The rows of a part; keys are the row's number in all files.

        Raises: ValueError naming the file if it is damaged.
        """
        del size
        assert part.count is not None, "parts() says how many rows a part has"
        path = self.files[part.file]
        before = sum(map(sum, self.row_groups[: part.file]))
        for number, record in enumerate(_records(path, part.first, part.count, self.row_groups[part.file], self.columns), part.first):
            yield self._row(record, f"{before + number:08d}", f"{path}: row {number}")

    def _row(self, record: Mapping[str, object], key: str, where: str) -> Row | UnreadableRow:
        content, path = image_cell(record[self.columns.image])
        if content is None:
            reason = (
                "it has no image" if path is None else f"its image is only the path {path[:100]!r}, not bytes; pack the files as a folder"
            )
            return UnreadableRow(key, reason, where)
        if len(content) > MAX_IMAGE_BYTES:
            return UnreadableRow(key, f"its image has {len(content)} bytes, at most {MAX_IMAGE_BYTES} are allowed", where)
        caption = caption_cell(record[self.columns.text]) if self.columns.text is not None else None
        labels = {
            name: names[number]
            for name, names in self.columns.labels.items()
            if isinstance(number := record[name], int) and 0 <= number < len(names)
        }
        return Row(key, content, caption, labels, {"file": PurePosixPath(path).name} if path else {}, where)


def _opened(path: Path) -> ParquetFile:
    """Raises: ValueError if pyarrow is missing, or the file is not there or not Parquet."""
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise ValueError(f"{path}: reading Parquet needs pyarrow; pip install 'halfstep[hub]'") from None
    try:
        return ParquetFile(path, buffer_size=_READ_BYTES)
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path}: can't be read as Parquet ({error}); give another file, or fetch it again") from None


def _columns(file: ParquetFile) -> dict[str, Column]:
    """The columns by their Arrow types, and by what `datasets` notes of them in the file."""
    from pyarrow import types

    schema = file.schema_arrow
    features = _features((schema.metadata or {}).get(b"huggingface", b"{}"))
    found: dict[str, Column] = {}
    for field in schema:
        feature = features.get(field.name)
        noted = feature if isinstance(feature, dict) else {}
        names = noted.get("names")
        if noted.get("_type") == "ClassLabel" and isinstance(names, list):
            found[field.name] = Column("label", tuple(map(str, names)))
        elif noted.get("_type") == "Image":
            found[field.name] = Column("image")
        elif types.is_struct(field.type):
            found[field.name] = Column("record" if field.type.get_field_index("bytes") >= 0 else "other")
        elif types.is_binary(field.type) or types.is_large_binary(field.type):
            found[field.name] = Column("binary")
        elif types.is_string(field.type) or types.is_large_string(field.type):
            found[field.name] = Column("text")
        elif types.is_list(field.type) and types.is_string(field.type.value_type):
            found[field.name] = Column("texts")
        else:
            found[field.name] = Column("other")
    return found


def _features(noted: bytes) -> dict[str, object]:
    """What `datasets` wrote of a table's columns; nothing if it is not to be understood."""
    try:
        features = json.loads(noted)["info"]["features"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return features if isinstance(features, dict) else {}


def _parts(file: int, groups: Sequence[int], rows: int) -> Iterator[Part]:
    first = count = 0
    for group in groups:
        if count and (count >= rows or group > 2 * rows):
            yield Part(file, first, count)
            first, count = first + count, 0
        if group > 2 * rows:
            yield from (Part(file, first + part.first, part.count) for part in even_parts(group, rows))
            first += group
        else:
            count += group
    if count:
        yield Part(file, first, count)


def _records(path: Path, first: int, count: int, groups: Sequence[int], columns: Columns) -> Iterator[Mapping[str, object]]:
    """Rows first .. first+count-1 of a file, a few unpacked at a time. Raises: ValueError."""
    from pyarrow import ArrowException

    ends = list(accumulate(groups))
    wanted = [i for i, (end, rows) in enumerate(zip(ends, groups, strict=True)) if end > first and end - rows < first + count]
    at = ends[wanted[0]] - groups[wanted[0]]
    try:
        with _opened(path) as file:
            for batch in file.iter_batches(_BATCH_ROWS, row_groups=wanted, columns=columns.names, use_threads=False):
                low, high = max(0, first - at), min(len(batch), first + count - at)
                at += len(batch)
                if low < high:
                    yield from batch.slice(low, high - low).to_pylist()
                if at >= first + count:
                    return
    except (OSError, ArrowException) as error:
        raise ValueError(f"{path}: rows {first} to {first + count - 1} can't be read ({error}); fetch the file again") from None
    if at < first + count:
        raise ValueError(f"{path}: it ends at row {at}, though its footer lists {ends[-1]}; fetch the file again")


def _footer_sha256(path: Path) -> str:
    with path.open("rb") as file:
        end = file.seek(-_FOOTER_BYTES, 2)
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, end - length))
        return hashlib.sha256(file.read()).hexdigest()
