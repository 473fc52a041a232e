"""What `datasets` is asked for: the tables of a data set at one commit, downloaded, cached or streamed, and its card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from data_shards.hub.access import COMMIT, hub_errors
from data_shards.hub.columns import Column
from data_shards.sources.rows import Part

if TYPE_CHECKING:
    from datasets import Dataset, DatasetBuilder, IterableDataset

CHUNK_ROWS = 32  # rows unpacked at a time: 100 of 1 MB would be held otherwise
Record = Mapping[str, object]


def online_builder(repo: str, config: str | None, sha: str) -> DatasetBuilder:
    """What makes the tables of a config. Raises: ValueError that lists the configs if there is no such one, or several."""
    import datasets
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError

    with hub_errors(repo, revision=sha):
        try:
            # hf://: a folder OWNER/NAME in the working directory is not meant
            builder = datasets.load_dataset_builder(f"hf://datasets/{repo}", name=config, revision=sha)
        except ValueError as error:
            raise _config_error(repo, config, sha, error) from error
        except (DataFilesNotFoundError, EmptyDatasetError):
            raise ValueError(
                f"{repo} holds no file that `datasets` reads (parquet, webdataset, images, json, csv); give another one"
            ) from None
    if builder.hash != sha:  # on errors `datasets` falls back to whatever it downloaded last, of any revision
        raise ConnectionError(
            f"{repo} on the Hugging Face Hub can't be read right now; try again, or set HF_HUB_OFFLINE=1 to work with what is in the cache"
        )
    return builder


def _config_error(repo: str, config: str | None, sha: str, error: ValueError) -> ValueError:
    """Why there is no builder: the config that is asked for, or else the card."""
    import datasets

    names: list[str] = []
    with suppress(ValueError):
        names = datasets.get_dataset_config_names(f"hf://datasets/{repo}", revision=sha)
    if config in names or (config is None and len(names) < 2):
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return ValueError(f"{repo} at {sha}: the configs of its card can't be read ({reason}); give another revision")
    asked = "is made of several configs" if config is None else f"has no config {config!r}"
    return ValueError(f"{repo} {asked}; give --config with one of {', '.join(names) or 'those that its page lists'}")


def cached_builder(repo: str, config: str | None, revision: str | None) -> DatasetBuilder:
    """The tables that were made earlier: of the commit, or without one the latest."""
    from datasets import config as settings
    from datasets.naming import camelcase_to_snakecase
    from datasets.packaged_modules.cache.cache import Cache

    owner, _, name = repo.rpartition("/")
    root = Path(settings.HF_DATASETS_CACHE) / "___".join(filter(None, [owner, camelcase_to_snakecase(name)]))
    found = [path.parent for path in root.glob(f"{config or '*'}/*/*/dataset_info.json") if COMMIT.fullmatch(path.parent.name)]
    found.sort(key=lambda folder: folder.stat().st_mtime)
    wanted = [folder for folder in found if revision in (None, folder.name)]
    offline = "HF_HUB_OFFLINE or HF_DATASETS_OFFLINE is set"
    if not wanted:
        there = ", ".join(sorted({f"{folder.parts[-3]} at {folder.name}" for folder in found})) or "nothing of it"
        raise ValueError(
            f"{repo}{f' ({config})' if config else ''} at {revision or 'any revision'} is not in the cache {root.parent}, and {offline}: "
            f"there is {there}; offline a revision is the whole commit. Unset the variable, or copy the cache of a machine that has it"
        )
    last = wanted[-1]
    configs = sorted({folder.parts[-3] for folder in wanted if folder.name == last.name})
    if len(configs) > 1:
        raise ValueError(f"{repo} is in the cache with several configs; give --config with one of {', '.join(configs)}")
    return Cache(
        cache_dir=str(settings.HF_DATASETS_CACHE),
        dataset_name=name,
        repo_id=repo,
        config_name=configs[0],
        version=last.parent.name,
        hash=last.name,
    )


def check_split(builder: DatasetBuilder, repo: str, split: str) -> None:
    """Before anything is downloaded. Raises: ValueError that lists the splits."""
    splits = [str(name) for name in (builder.info.splits or builder.config.data_files or {})]
    if splits and split not in splits:
        raise ValueError(f"{repo} has no split {split!r}; give --split with one of {', '.join(splits)}")


@contextmanager
def table_errors(repo: str, sha: str) -> Iterator[None]:
    """Errors of the Hub as hub_errors tells them; those of files that are no tables, or not alike, name the data set."""
    from datasets.exceptions import DatasetsError

    with hub_errors(repo, revision=sha):
        try:
            yield
        except (DatasetsError, ValueError) as error:
            reason = str(error.__cause__ or error).strip().partition("\n")[0]
            raise ValueError(
                f"{repo} at {sha}: its files can't be read as one table ({reason}); give another revision or data set"
            ) from error


def downloaded(builder: DatasetBuilder, repo: str, split: str) -> Dataset:
    """A split as Arrow files in the cache."""
    import datasets

    with table_errors(repo, str(builder.hash)):
        builder.download_and_prepare()
        table = builder.as_dataset(split=split)
    assert isinstance(table, datasets.Dataset), "one split is one table"
    return table


@contextmanager
def without_torch() -> Iterator[None]:
    """Streams made here are no torch data sets: `datasets` would import torch for each worker process, 1.2 s on 2 cores."""
    from datasets import config as settings

    found, settings.TORCH_AVAILABLE = settings.TORCH_AVAILABLE, False
    try:
        yield
    finally:
        settings.TORCH_AVAILABLE = found


def undecoded(builder: DatasetBuilder, repo: str, split: str) -> IterableDataset:
    """A split that is read over the network, its images as the bytes they are."""
    import datasets

    with table_errors(repo, str(builder.hash)), without_torch():
        if "decode_num_threads" in vars(builder.config):  # folders of images are decoded by threads otherwise
            vars(builder.config)["decode_num_threads"] = 0
        stream = builder.as_streaming_dataset(split=split)
        assert isinstance(stream, datasets.IterableDataset), "one split is one stream"
        stream = stream if stream.features is not None else stream._resolve_features()
        for name, feature in (stream.features or {}).items():
            if type(feature) is datasets.Image:
                stream = stream.cast_column(name, datasets.Image(decode=False))
        return stream


def table_records(tables: Sequence[str], part: Part, names: list[str]) -> Iterator[Record]:
    """A range of rows of Arrow files in sequence; only the batches that hold some of them are looked into."""
    import pyarrow as pa

    assert part.count is not None, "the number of rows of a table is known"
    first, left = part.first, part.count
    for table in tables:
        with pa.memory_map(table) as file, pa.ipc.open_stream(file) as reader:
            for batch in reader:
                if first >= batch.num_rows:
                    first -= batch.num_rows
                    continue
                chosen = batch.select(names).slice(first, left)
                first, left = 0, left - chosen.num_rows
                for begin in range(0, chosen.num_rows, CHUNK_ROWS):
                    yield from chosen.slice(begin, CHUNK_ROWS).to_pylist()
                if left == 0:
                    return
    raise ValueError(f"{tables[-1]}: {left} rows are missing at its end; remove its folder from the cache to make it again")


def columns_of(features: Mapping[str, object]) -> dict[str, Column]:
    """The columns of `datasets`, as far as they matter here."""
    import datasets

    found: dict[str, Column] = {}
    for name, feature in features.items():
        match feature:
            case datasets.Image():
                found[name] = Column("image")
            case datasets.ClassLabel():
                found[name] = Column("label", tuple(str(one) for one in feature.names or ()))
            case datasets.Value(dtype="string" | "large_string"):
                found[name] = Column("text")
            case datasets.Value(dtype="binary" | "large_binary"):
                found[name] = Column("binary")
            case datasets.List(feature=datasets.Value(dtype="string")) | datasets.LargeList(feature=datasets.Value(dtype="string")):
                found[name] = Column("texts")
            case {"bytes": datasets.Value(dtype="binary" | "large_binary")}:
                found[name] = Column("record")
            case _:
                found[name] = Column("other")
    return found


def terms(repo: str, sha: str, *, offline: bool) -> dict[str, object]:
    """Licence and tags as the data set's card states them; the account that holds it is named as the creator."""
    from huggingface_hub import DatasetCard, hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    card: dict[str, object] = {}
    with hub_errors(repo, revision=sha), suppress(LocalEntryNotFoundError if offline else RemoteEntryNotFoundError):
        path = hf_hub_download(repo, "README.md", repo_type="dataset", revision=sha, local_files_only=offline)
        card = DatasetCard.load(path, ignore_metadata_errors=True).data.to_dict()
    name = card.get("license") or card.get("license_name") or "not stated"
    name = ", ".join(str(one) for one in name) if isinstance(name, list) else str(name)
    if name == "other" and card.get("license_name"):
        name = str(card["license_name"])
    free, named = name.lower().startswith(("cc0", "pddl", "unlicense")), name.lower().startswith(("cc-by", "odc-by", "mit", "apache"))
    tags = card.get("tags")
    return {
        "name": name,
        "url": card.get("license_link") or None,
        "creators": [repo.rpartition("/")[0]] if "/" in repo else [],
        "attribution_required": True if named else False if free else None,
        "text": None,
        "tags": [str(tag) for tag in tags] if isinstance(tags, list) else [],
        "source_url": f"https://huggingface.co/datasets/{repo}",  # of a mirror too: it is part of what was packed,
    }
