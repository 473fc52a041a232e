"""What the tests that fetch share: a file, a policy whose waits take no time, and the fetch of the one by the other."""

import hashlib
from dataclasses import replace
from pathlib import Path

from data_shards.fetch import Fetched, fetch
from data_shards.locations import Location
from data_shards.retry import RetryPolicy
from tests.data_shards.store_server import StoreServer

CONTENT = bytes(range(256)) * 40
SHA = hashlib.sha256(CONTENT).hexdigest()
PATH = "/shards/a.tar"


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
