"""Uploads shards to the Hugging Face Hub: tars first, in commits that an interrupted push keeps, then index.json and the card."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from data_shards.config import INDEX_NAME
from data_shards.hub.access import checked_repository, hub_api, hub_errors
from data_shards.hub.card import MARK, card_text, licence_note
from data_shards.index import SHARD_NAME, Shard, ShardIndex, ShardIndexError

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

logger = logging.getLogger(__name__)
CARD_NAME = "README.md"
COMMIT_SHARDS = 100  # the Hub counts commits an hour, and wants few hundred files in each
COMMIT_BYTES = 10 * 2**30
Progress = Callable[[int, int], None]


class RemoteFile(NamedTuple):
    """A file that the repository holds: sha256 of an LFS file, else its git hash."""

    sha256: str | None
    sha1: str


def push_shards(
    root: Path, repo: str, *, private: bool = True, message: str = "Shards by halfstep", progress: Progress | None = None
) -> str:
    """Uploads the shards below `root` and a card; called again it sends only what is not there yet.

    The token is the one in HF_TOKEN or of `hf auth login`. private: of a repository that is made now; one that is there stays as it is.
    progress: called with bytes of shards that are there, and of all. Returns where they can be read from: hf://datasets/REPO@COMMIT.
    Raises: ValueError if the shards are damaged, the repository holds other ones, or may not be written; ConnectionError if the Hub
    can't be reached: the same call goes on later.
    """
    api, repo = hub_api(), checked_repository(repo)
    index = ShardIndex.load(root)
    _check_files(index)
    _check_token(repo)
    note = licence_note(index)
    if note is not None:
        logger.warning("%s: %s", repo, note)
    with hub_errors(repo):
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        there = _remote_files(api, repo)
        _check_remote(there, index, repo)
        wanted = [shard for shard in index.shards if not _is_there(there.get(shard.name), index.root / shard.name, shard)]
        total = sum(shard.size_bytes for shard in index.shards)
        done = total - sum(shard.size_bytes for shard in wanted)
        report = progress or _no_progress
        report(done, total)
        sent = len(index.shards) - len(wanted)
        for batch in _batches(wanted):
            operations = [_shard_operation(index.root / shard.name, shard) for shard in batch]
            sent += len(batch)
            api.create_commit(
                repo, operations, commit_message=f"{message}: {sent} of {len(index.shards)} shards", repo_type="dataset", num_threads=4
            )
            done += sum(shard.size_bytes for shard in batch)
            report(done, total)
        return f"hf://datasets/{repo}@{_finish(api, repo, index, there, message)}"


def _check_files(index: ShardIndex) -> None:
    """Raises: ShardIndexError if a tar is not there or of another size; bytes are compared when they are sent."""
    if index.location is not None:
        raise ShardIndexError(f"{index.root}: its tars lie at {index.location}; push from the folder that holds them")
    for shard in index.shards:
        path = index.root / shard.name
        if not path.is_file() or path.stat().st_size != shard.size_bytes:
            raise ShardIndexError(f"{path} is missing or not of {shard.size_bytes} bytes; `halfstep shards verify` tells more")


def _check_token(repo: str) -> None:
    from huggingface_hub import get_token

    if get_token() is None:
        raise ValueError(f"{repo}: pushing needs a token with write access; set HF_TOKEN to one, or run `hf auth login`")


def _remote_files(api: "HfApi", repo: str) -> dict[str, RemoteFile]:
    """What lies at the top of the repository's main branch."""
    from huggingface_hub.hf_api import RepoFile

    return {
        entry.path: RemoteFile(entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in api.list_repo_tree(repo, repo_type="dataset")
        if isinstance(entry, RepoFile)
    }


def _check_remote(there: dict[str, RemoteFile], index: ShardIndex, repo: str) -> None:
    """Raises: ValueError if the repository holds tars that are none of these: readers that list it would mix them."""
    ours = {shard.name for shard in index.shards}
    strangers = sorted(name for name in there if SHARD_NAME.fullmatch(name) and name not in ours)
    if strangers:
        raise ValueError(
            f"{repo} holds {strangers[0]}{f' and {len(strangers) - 1} more tars' if strangers[1:] else ''}, of other shards; "
            "push to another repository, or delete them there first"
        )


def _is_there(remote: RemoteFile | None, path: Path, shard: Shard) -> bool:
    if remote is None:
        return False
    return remote.sha256 == shard.sha256 if remote.sha256 is not None else remote.sha1 == _git_sha1(path)


def _git_sha1(path: Path) -> str:
    """How git names a file that is not in LFS; those are small."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _batches(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    batch: list[Shard] = []
    for shard in shards:
        if batch and (len(batch) == COMMIT_SHARDS or sum(one.size_bytes for one in batch) + shard.size_bytes > COMMIT_BYTES):
            yield batch
            batch = []
        batch.append(shard)
    if batch:
        yield batch


def _shard_operation(path: Path, shard: Shard) -> "CommitOperationAdd":
    """Raises: ShardIndexError if the tar is no longer what was packed."""
    from huggingface_hub import CommitOperationAdd

    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != shard.sha256:
        raise ShardIndexError(
            f"{path} is damaged: its sha256 is {found[:12]}, the index says {shard.sha256[:12]}; restore it, or pack the shards again"
        )
    return CommitOperationAdd(shard.name, path)


def _finish(api: "HfApi", repo: str, index: ShardIndex, there: dict[str, RemoteFile], message: str) -> str:
    """Sends index and card in one commit, after all tars; returns its sha. A card that people wrote is left alone."""
    from huggingface_hub import CommitOperationAdd

    operations = [CommitOperationAdd(INDEX_NAME, index.root / INDEX_NAME)]
    if CARD_NAME not in there or MARK in Path(api.hf_hub_download(repo, CARD_NAME, repo_type="dataset")).read_text(encoding="utf-8"):
        operations.append(CommitOperationAdd(CARD_NAME, card_text(index, repo).encode()))
    else:
        logger.warning("%s: the card there was not written by a push, so it stays as it is", repo)
    return api.create_commit(repo, operations, commit_message=f"{message}: index and card", repo_type="dataset").oid


def _no_progress(_done: int, _total: int) -> None:
    return
