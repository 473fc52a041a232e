"""What the tests that fetch share: a file, a policy whose waits take no time, and the fetch of the one by the other."""

import hashlib
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from io import FileIO
from pathlib import Path

from data_shards.remote.cache import ShardCache
from data_shards.remote.fetch import Fetched, fetch
from data_shards.remote.locations import Location
from data_shards.remote.retry import RetryPolicy
from tests.data_shards.store_server import StoreServer

CONTENT = bytes(range(256)) * 40
SHA = hashlib.sha256(CONTENT).hexdigest()
PATH = "/shards/a.tar"
SIZE = len(CONTENT)


class Slept(list[float]):
    """The waits that a policy asked for, none of which took place."""

    def policy(self, **changes: float) -> RetryPolicy:
        """The default policy, but for `changes`; its random number is always a half."""
        return replace(RetryPolicy(sleep=self.append, stall_seconds=5.0, random=lambda: 0.5), **changes)


def get(store: StoreServer, path: Path, policy: RetryPolicy, *, size_bytes: int | None = len(CONTENT), sha256: str | None = SHA) -> Fetched:
    """Fetches PATH."""
    return fetch(Location.parse(store.url + PATH), path, size_bytes=size_bytes, sha256=sha256, policy=policy)


def names(folder: Path) -> list[str]:
    """The files of a folder."""
    return sorted(path.name for path in folder.iterdir())


def content_of(letter: str) -> tuple[bytes, str]:
    """A file of the usual size, and its hash."""
    content = letter.encode() * SIZE
    return content, hashlib.sha256(content).hexdigest()


def fill(store: StoreServer, cache: ShardCache, letters: str) -> dict[str, str]:
    """Opens and closes files of these letters, in this order; their hashes."""
    hashes: dict[str, str] = {}
    for letter in letters:
        content, hashes[letter] = content_of(letter)
        store.put(f"/{letter}", content)
        open_letter(store, cache, letter).close()
        path = cache.folder / hashes[letter][:2] / hashes[letter]
        os.utime(path, ns=(1, ord(letter)))  # a clock may be too coarse to tell them apart
    return hashes


def open_letter(store: StoreServer, cache: ShardCache, letter: str) -> FileIO:
    """Opens the file of this letter."""
    return cache.open(Location.parse(f"{store.url}/{letter}"), size_bytes=SIZE, sha256=content_of(letter)[1])


def cached(cache: ShardCache) -> set[str]:
    """The hashes of the files that are here whole."""
    return {path.name for path in cache.folder.glob("??/*") if len(path.name) == 64}


def until(true: Callable[[], bool]) -> None:
    """Waits for another process or thread; fails after 20 seconds."""
    limit = time.monotonic() + 20
    while not true():
        assert time.monotonic() < limit, "it did not happen within 20 seconds"
        threading.Event().wait(0.005)
