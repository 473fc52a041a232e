"""The node's cache of remote shards: files by their sha256, each downloaded once a node, and held open while they are read."""

import errno
import fcntl
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from io import FileIO
from pathlib import Path
from typing import final

from data_shards.remote.cache_room import CacheRoom
from data_shards.remote.fetch import DEFAULT_POLICY, fetch
from data_shards.remote.locations import Location
from data_shards.remote.prefetch import Prefetcher, Wish
from data_shards.remote.retry import RetryPolicy
from data_shards.remote.transport import BLOCK_BYTES

logger = logging.getLogger(__name__)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_OPENINGS = 3  # a file may be evicted between its arrival and its opening, but hardly so often


def default_cache_folder() -> Path:
    """$HALFSTEP_CACHE, else $XDG_CACHE_HOME/halfstep, else ~/.cache/halfstep."""
    own = os.environ.get("HALFSTEP_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfstep"


@final
class ShardCache:
    """Remote files on this node's disk, shared by all its processes; at most `limit_bytes` of them.

    limit_setting: what a user raises when that is too little. prefetch_ahead: wishes that wait; more are dropped.
    A copy sent to another process, by fork or pickle, has its own thread and counts for itself.
    bytes_fetched: what this process brought over the network, whole files only. hits: openings that found their file here.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        policy: RetryPolicy = DEFAULT_POLICY,
        limit_setting: str = "data.cache_gib",
        prefetch_ahead: int = 4,
    ) -> None:
        self.folder = folder
        self.policy = policy
        self.bytes_fetched = 0
        self.hits = 0
        self._room = CacheRoom(folder, limit_bytes, limit_setting)
        self._limit_setting = limit_setting
        self._prefetch_ahead = prefetch_ahead
        self._prefetcher: Prefetcher | None = None
        _make_private(folder)

    def __getstate__(self) -> dict[str, object]:
        """Everything but the thread and the counts."""
        return {**self.__dict__, "_prefetcher": None, "bytes_fetched": 0, "hits": 0}

    def __enter__(self) -> "ShardCache":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self, location: Location, *, size_bytes: int, sha256: str, verify: bool = False) -> FileIO:
        """The file of this content, brought here if need be; it is not evicted before it is closed.

        What is here is trusted by its size, because its hash was checked when it came; verify: hash it again.
        Raises: FetchError, RuntimeError if readers hold the whole cache, OSError of the disk, ValueError if it can't ever fit.
        """
        path = self._path(sha256)
        file = _opened(path, size_bytes)
        if file is not None and verify and _sha256(file) != sha256:
            logger.warning("%s: the cached copy is damaged; it is fetched again", location)
            path.unlink(missing_ok=True)
            file.close()
            file = None
        if file is not None:
            self.hits += 1
            return file
        for _ in range(_OPENINGS):
            self._bring(Wish(location, size_bytes, sha256), self.policy, wait=True)
            file = _opened(path, size_bytes)
            if file is not None:
                return file
        raise RuntimeError(f"{self.folder}: {location} was evicted {_OPENINGS} times before it was read; raise {self._limit_setting}")

    def prefetch(self, location: Location, *, size_bytes: int, sha256: str) -> None:
        """Has the file brought in the background, unless it is here or another process is at it. What fails is left to `open`."""
        if _is_present(self._path(sha256), size_bytes):
            return
        if self._prefetcher is None or self._prefetcher.process != os.getpid():
            self._prefetcher = Prefetcher(self._bring_ahead, self._prefetch_ahead)
        self._prefetcher.ask(Wish(location, size_bytes, sha256))

    def close(self) -> None:
        """Ends the background thread; what it was fetching stays as a part. Open files stay open."""
        if self._prefetcher is not None and self._prefetcher.process == os.getpid():
            self._prefetcher.close()
        self._prefetcher = None

    def _bring_ahead(self, wish: Wish, prefetcher: Prefetcher) -> None:
        # One attempt: `open` is the one who is patient, and goes on from the part.
        policy = replace(self.policy, attempts=1, stop=prefetcher.is_closing)
        self._bring(wish, policy, wait=False)

    def _bring(self, wish: Wish, policy: RetryPolicy, *, wait: bool) -> None:
        """Fetches a file unless it is here; one process or thread at a time, the others wait for it or leave it alone."""
        path = self._path(wish.sha256)
        _make_private(path.parent)
        with _exclusive(path.with_name(path.name + ".lock"), wait=wait) as lock:
            if lock is None or _is_present(path, wish.size_bytes):
                return
            path.unlink(missing_ok=True)  # of another size, so it can't be what it is called
            with self._room.reserved(wish.sha256, wish.size_bytes, lock):
                came_bytes = self._fetched_bytes(wish, path, policy)
                self.bytes_fetched += came_bytes  # read only now: other threads add to it while we fetch

    def _fetched_bytes(self, wish: Wish, path: Path, policy: RetryPolicy) -> int:
        for first in (True, False):
            try:
                return fetch(wish.location, path, size_bytes=wish.size_bytes, sha256=wish.sha256, policy=policy).came_bytes
            except OSError as error:
                if error.errno not in _DISK_FULL:
                    raise
                if not first:
                    free = os.statvfs(self.folder)
                    raise OSError(
                        error.errno,
                        f"{self.folder}: the disk is full: {wish.location} needs {wish.size_bytes} bytes, "
                        f"{free.f_bavail * free.f_frsize} are free and nothing more can be evicted; free some, or move the cache "
                        "with HALFSTEP_CACHE",
                    ) from error
                logger.warning("%s: the disk is full before %s limits it; evicting", self.folder, self._limit_setting)
                self._room.free(wish.size_bytes, keep=wish.sha256)
        raise AssertionError("the second round returns or raises")

    def _path(self, sha256: str) -> Path:
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"sha256 {sha256!r:.80} is not 64 lower-case hexadecimal digits; restore the index that says so")
        return self.folder / sha256[:2] / sha256


def _opened(path: Path, size_bytes: int) -> FileIO | None:
    """The file, held against eviction and marked as used just now; None if it is not there whole or is just being evicted."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    held = False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        facts = os.fstat(descriptor)
        held = facts.st_nlink > 0 and facts.st_size == size_bytes
        if held:
            os.utime(descriptor)
    except BlockingIOError:
        held = False
    finally:
        if not held:
            os.close(descriptor)
    return FileIO(descriptor) if held else None


def _is_present(path: Path, size_bytes: int) -> bool:
    try:
        return path.stat().st_size == size_bytes
    except FileNotFoundError:
        return False


def _sha256(file: FileIO) -> str:
    found, offset = hashlib.sha256(), 0
    while block := os.pread(file.fileno(), BLOCK_BYTES, offset):
        found.update(block)
        offset += len(block)
    return found.hexdigest()


@contextmanager
def _exclusive(path: Path, *, wait: bool) -> Iterator[int | None]:
    """Holds a lock file, which the kernel frees if we die; None if another one has it and we do not wait."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield None
            return
        try:
            yield descriptor
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough: a process forked meanwhile has a copy
    finally:
        os.close(descriptor)


def _make_private(folder: Path) -> None:
    """A folder of our own: its files are trusted, so nobody else may put any there. Raises: ValueError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    facts = folder.stat()
    if facts.st_mode & 0o022:
        raise ValueError(
            f"{folder}: others may write to it, so what is cached there can't be trusted; chmod go-w it, or set HALFSTEP_CACHE"
        )
    if facts.st_uid not in (0, os.geteuid()) and os.geteuid():
        raise ValueError(
            f"{folder}: belongs to user {facts.st_uid}, so what is cached there can't be trusted; set HALFSTEP_CACHE to your own"
        )
