"""A data set of the Hugging Face Hub as a source of rows: pinned to a commit, its images handed over as the bytes they are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, cast, final

from data_shards.config import MAX_CAPTION_BYTES, MAX_IMAGE_BYTES
from data_shards.hub.access import checked_repository, commit_sha, hub_errors, need_datasets
from data_shards.hub.columns import Columns, choose_columns
from data_shards.hub.datasets_api import (
    Record,
    cached_builder,
    check_split,
    columns_of,
    downloaded,
    online_builder,
    table_errors,
    table_records,
    terms,
    undecoded,
    without_torch,
)
from data_shards.sources.cells import caption_cell, image_cell
from data_shards.sources.rows import Part, Row, UnreadableRow

if TYPE_CHECKING:
    from datasets import IterableDataset

ARCHIVES = ("zip", "tar", "gzip")


class _NoImageError(ValueError):
    """A row whose image can't be had, though the Hub is there; says why."""


@final
@dataclass(frozen=True)
class HubSource:
    """One split of a data set at one commit; knows by names what it reads, so that a worker process opens it for itself.

    revision: the commit. count: None when streaming. tables: the Arrow files of the cache; stream_files: how many files are streamed.
    terms: what `licence` tells. Make one with `open`.
    """

    repo: str
    config: str
    split: str
    revision: str
    columns: Columns
    count: int | None
    tables: tuple[str, ...] = ()
    stream_files: int = 0
    terms: Mapping[str, object] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        repo: str,
        *,
        split: str = "train",
        config: str | None = None,
        revision: str | None = None,
        image_column: str | None = None,
        text_column: str | None = None,
        streaming: bool = False,
    ) -> HubSource:
        """Looks the data set up and, unless streaming, downloads it into the cache of `datasets`.

        revision: a branch, tag or commit; without one the head of main, offline the one that was downloaded last. text_column="": none.
        Raises: ValueError for what is not there, not allowed or unclear; ConnectionError if the Hub can't be reached.
        """
        need_datasets()
        from datasets import config as settings

        repo = checked_repository(repo)
        offline = bool(settings.HF_HUB_OFFLINE)
        if offline and streaming:
            raise ValueError(
                f"{repo}: streaming needs the network, which HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids; unset them, or go without "
                "--streaming if the data set is in the cache"
            )
        if offline:
            builder = cached_builder(repo, config, revision)
            sha = str(builder.hash)
        else:
            sha = commit_sha(repo, revision)
            builder = online_builder(repo, config, sha)
        check_split(builder, repo, split)
        card = terms(repo, sha, offline=offline)
        if streaming:
            stream = undecoded(builder, repo, split)
            columns = choose_columns(columns_of(stream.features or {}), image=image_column, text=text_column, where=f"{repo} ({split})")
            return cls(repo, builder.config.name, split, sha, columns, None, stream_files=stream.num_shards, terms=card)
        table = downloaded(builder, repo, split)
        columns = choose_columns(columns_of(table.features), image=image_column, text=text_column, where=f"{repo} ({split})")
        files = tuple(str(file["filename"]) for file in table.cache_files)
        return cls(repo, builder.config.name, split, sha, columns, len(table), tables=files, terms=card)

    @property
    def streaming(self) -> bool:
        """Whether rows come over the network while they are read."""
        return self.count is None

    def describe(self) -> dict[str, object]:
        """Repository, commit, and what is read there in which way."""
        return {
            "kind": "hub",
            "name": self.repo,
            "revision": self.revision,
            "config": self.config,
            "split": self.split,
            "image_column": self.columns.image,
            "text_column": self.columns.text,
            "label_columns": sorted(self.columns.labels),
            "streaming": self.streaming,
            "count": self.count,
        }

    def licence(self) -> dict[str, object]:
        """What the data set's card says."""
        return dict(self.terms)

    def parts(self, rows: int) -> Sequence[Part]:
        """Ranges of about `rows` rows; when streaming, one part a file of the data set."""
        if self.count is None:
            return [Part(file, 0, None) for file in range(self.stream_files)]
        return [Part(0, first, min(rows, self.count - first)) for first in range(0, self.count, rows)]

    def read(self, part: Part, size: int | None) -> Iterator[Row | UnreadableRow]:
        """The rows of a part; keys are row numbers, when streaming FILE-ROW.

        Raises: ValueError or OSError if a table can't be read, ConnectionError if the Hub can't be reached any more.
        """
        records = self._streamed(part) if self.streaming else table_records(self.tables, part, self.columns.names)
        for number, record in enumerate(records, start=part.first):
            key = f"{part.file:05d}-{number:08d}" if self.streaming else f"{number:08d}"
            of_file = f" of file {part.file}" if self.streaming else ""
            yield self._row(record, key, f"{self.repo} ({self.split}) row {number}{of_file}")

    def _streamed(self, part: Part) -> Iterator[Record]:
        """Records of one file; those before `first` are passed over undecoded. `datasets` sits out 9 minutes of a Hub that is gone."""
        stream = _stream(self.repo, self.config, self.split, self.revision, os.getpid())
        with table_errors(self.repo, self.revision), without_torch():
            rows = stream.shard(num_shards=self.stream_files, index=part.file).select_columns(self.columns.names)
            rows = rows.skip(part.first) if part.first else rows
            for record in rows if part.count is None else rows.take(part.count):
                yield cast(Record, record)

    def _row(self, record: Record, key: str, where: str) -> Row | UnreadableRow:
        caption = caption_cell(record.get(self.columns.text) if self.columns.text is not None else None)
        if caption is not None and len(caption.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
            return UnreadableRow(key, f"its caption is longer than {MAX_CAPTION_BYTES} bytes", where)
        content, path = image_cell(record[self.columns.image])
        if content is None:
            try:
                content = self._file(path)
            except (_NoImageError, FileNotFoundError) as error:
                return UnreadableRow(key, str(error), where)
        if len(content) > MAX_IMAGE_BYTES:
            return UnreadableRow(key, f"its image has {len(content)} bytes, at most {MAX_IMAGE_BYTES} are allowed", where)
        labels = {name: names[number] for name, names in self.columns.labels.items() if (number := _label(record[name], len(names))) >= 0}
        extra = {"file": PurePosixPath(path.partition("::")[0]).name} if path else {}
        return Row(key, content, caption, labels, extra, where)

    def _file(self, path: str | None) -> bytes:
        """The bytes of an image that a row only names: a file of this data set at this commit, or one that `datasets` put in its cache.

        Raises: _NoImageError for any other place: a table must not be able to name the user's own files, nor let them be fetched.
        """
        if not path:
            raise _NoImageError("it has no image")
        if path.startswith(("http://", "https://")):
            raise _NoImageError("its image is only a URL, which is not fetched; download the images first and pack them as a folder")
        import fsspec

        *archives, home = path.split("::")
        prefix = f"hf://datasets/{self.repo}@{self.revision}/"
        if not archives and "://" not in home and not home.startswith("/"):
            home = prefix + home
        ours = _is_cached(home) if home.startswith("/") else home.startswith(prefix) and ".." not in PurePosixPath(home).parts
        if not ours or any(step.partition("://")[0] not in ARCHIVES for step in archives):
            raise _NoImageError(f"its image is at {path[:100]}, which is no file of this data set")
        opened = fsspec.open("::".join([*archives, home]), "rb")
        assert isinstance(opened, fsspec.core.OpenFile), "one name is one file"
        with hub_errors(self.repo, revision=self.revision), opened as file:
            return bytes(file.read(MAX_IMAGE_BYTES + 1))


@lru_cache(maxsize=4)
def _stream(repo: str, config: str, split: str, sha: str, process: int) -> IterableDataset:
    """The same, opened once a process: connections do not outlive a fork."""
    return undecoded(online_builder(repo, config, sha), repo, split)


def _label(value: object, names: int) -> int:
    """The number of a label; -1 where there is none, as in the test splits of some data sets."""
    return value if isinstance(value, int) and 0 <= value < names else -1


def _is_cached(path: str) -> bool:
    """Whether a local file is one that `datasets` or huggingface_hub put into their caches."""
    from datasets import config as settings
    from huggingface_hub import constants

    whole = Path(os.path.realpath(path))
    roots = (settings.HF_DATASETS_CACHE, settings.DOWNLOADED_DATASETS_PATH, constants.HF_HUB_CACHE)
    return any(whole.is_relative_to(os.path.realpath(root)) for root in roots)
