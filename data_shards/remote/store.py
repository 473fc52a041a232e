"""Where the tars of an index lie: a folder, or a remote store read through the node's cache."""

import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, final

from data_shards.index import Shard, ShardIndex
from data_shards.remote.locations import Location

if TYPE_CHECKING:
    from data_shards.remote.cache import ShardCache

_UNLIMITED_BYTES = 2**62


class Store(Protocol):
    """Opens shards; can be sent to another process."""

    def open(self, shard: Shard) -> FileIO:
        """The shard's tar, on this machine; it stays readable until it is closed.

        Raises: OSError of the local disk; FetchError if a remote one does not come.
        """
        ...

    def prefetch(self, shard: Shard) -> None:
        """Has the shard brought here meanwhile, if it has to come from afar; never waits and never raises."""
        ...

    def release(self, file: FileIO) -> None:
        """Closes a shard that the plan needs no more for long: of all in the cache it goes first."""
        ...


def store_of(index: ShardIndex, cache: "ShardCache | None" = None) -> Store:
    """The store that an index's tars lie in; cache: of remote ones, the node's usual one by default.

    Raises: ValueError if the index names a location of a scheme that is not allowed.
    """
    location = Location.parse(index.location) if index.location is not None else None
    if location is None or not location.is_remote:
        return _Folder(index.root if location is None else location.path)
    if cache is None:
        cache = open_cache(None, limit_gib=None)
    return _Cached(location, cache)


def stores_of(indexes: Sequence[ShardIndex], *, cache_folder: str | None = None, limit_gib: float | None = None) -> list[Store]:
    """The store of each index; remote ones share one cache, which is opened only if there are any. Raises: as store_of."""
    remote = any(index.location is not None and Location.parse(index.location).is_remote for index in indexes)
    cache = open_cache(cache_folder, limit_gib=limit_gib) if remote else None
    return [store_of(index, cache) for index in indexes]


def open_cache(folder: str | None, *, limit_gib: float | None) -> "ShardCache":
    """The node's cache in this folder, its usual place by default; without a limit it takes what the disk has."""
    from data_shards.remote.cache import ShardCache, default_cache_folder

    limit_bytes = _UNLIMITED_BYTES if limit_gib is None else int(limit_gib * 2**30)
    return ShardCache(default_cache_folder() if folder is None else Path(folder), limit_bytes, limit_setting="data.cache.limit_gib")


@final
class _Folder:
    """Tars in a folder that this machine sees."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, shard: Shard) -> FileIO:
        return FileIO(self._root / shard.name)

    def prefetch(self, shard: Shard) -> None:
        return

    def release(self, file: FileIO) -> None:
        file.close()


@final
class _Cached:
    """Tars in a remote store."""

    def __init__(self, location: Location, cache: "ShardCache") -> None:
        self._location = location
        self._cache = cache

    def open(self, shard: Shard) -> FileIO:
        return self._cache.open(self._location.join(shard.name), size_bytes=shard.size_bytes, sha256=shard.sha256)

    def prefetch(self, shard: Shard) -> None:
        self._cache.prefetch(self._location.join(shard.name), size_bytes=shard.size_bytes, sha256=shard.sha256)

    def release(self, file: FileIO) -> None:
        # Before those that were brought ahead and wait for their use, which by age alone would seem older.
        os.utime(file.fileno(), (0, 0))
        file.close()
