"""A store's index.json: asked for by its ETag, and served from the cache when the store can't be reached."""

import hashlib
import json
import logging
from pathlib import Path

from data_shards.files import replace_file
from data_shards.remote.cache import ShardCache
from data_shards.remote.fetch import Small, fetch_small
from data_shards.remote.locations import Location
from data_shards.remote.retry import OfflineError, UnreachableError

logger = logging.getLogger(__name__)
LARGEST_TEXT_BYTES = 2**28


def load_remote_text(location: Location, cache: ShardCache, *, limit_bytes: int = LARGEST_TEXT_BYTES) -> str:
    """The text of a remote file as the store has it now; as it was last seen, with a warning, if the store can't be asked.

    Raises: FetchError if it can't be had at all, or the store says that it is gone or not ours; ValueError if it is not UTF-8.
    """
    path = cache.folder / "texts" / hashlib.sha256(location.identity.encode()).hexdigest()
    kept = _kept(path)
    try:
        came = fetch_small(location, limit_bytes=limit_bytes, etag=None if kept is None else kept.etag, policy=cache.policy)
    except (UnreachableError, OfflineError) as error:
        if kept is None:
            raise
        logger.warning("%s: the store can't be asked, so the copy of the last time is used: %s", location, error)
        came = kept
    if came is None:
        assert kept is not None, "only an ETag that we sent can be answered with `not modified`"
        came = kept
    elif came is not kept:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        head = json.dumps({"etag": came.etag, "sha256": hashlib.sha256(came.content).hexdigest()})
        replace_file(path, head.encode() + b"\n" + came.content)
    try:
        return came.content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{location}: is not text in UTF-8 ({error}); is it the right file?") from None


def _kept(path: Path) -> Small | None:
    """What was kept of it: a line of JSON, then the content; None if there is none, or it is damaged."""
    try:
        head, _, content = path.read_bytes().partition(b"\n")
        note = json.loads(head)
        if note["sha256"] != hashlib.sha256(content).hexdigest():
            return None
        return Small(content, note["etag"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
