"""The cache's room: what it holds and has promised, and who goes first when something new comes."""

import fcntl
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import final

_FOLDER = re.compile(r"[0-9a-f]{2}")
_FILE = re.compile(r"([0-9a-f]{64})(\.part|\.lock)?")


@final
@dataclass(frozen=True)
class _Entry:
    """Something that takes room; sha256 of what it is or will be."""

    sha256: str
    path: Path
    size_bytes: int
    used_at_ns: int


@final
class CacheRoom:
    """The limit of a cache folder, kept by all processes that use it. setting: the limit's name in the recipe."""

    def __init__(self, folder: Path, limit_bytes: int, setting: str) -> None:
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._setting = setting

    @contextmanager
    def reserved(self, sha256: str, size_bytes: int, lock: int) -> Iterator[None]:
        """Makes room for a file that is about to come, and keeps it; lock: its lock file, held, where the promise is written.

        Raises: ValueError if it is larger than the whole cache; RuntimeError if readers hold too much of it.
        """
        if size_bytes > self._limit_bytes:
            raise ValueError(
                f"{self._folder}: a file of {size_bytes} bytes does not fit a cache of {self._limit_bytes}; raise {self._setting}, "
                "or pack smaller shards"
            )
        with self._counting():
            entries, promised = self._scan(sha256)
            used = sum(entry.size_bytes for entry in entries) + promised
            surplus = used + size_bytes - self._limit_bytes
            held = surplus - self._evict(entries, surplus)
            if held > 0:
                raise RuntimeError(
                    f"{self._folder}: no room for {size_bytes} bytes: {used} of {self._limit_bytes} are taken, and what is being read "
                    f"or fetched can't go; raise {self._setting} by at least {held} bytes, or keep fewer shards open"
                )
            os.pwrite(lock, str(size_bytes).encode(), 0)
        try:
            yield
        finally:
            os.ftruncate(lock, 0)

    def free(self, size_bytes: int, *, keep: str) -> None:
        """Evicts at least so many bytes, as far as nobody reads them; `keep`: the sha256 of what is being fetched."""
        with self._counting():
            self._evict(self._scan(keep)[0], size_bytes)

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """One process at a time counts and evicts."""
        descriptor = os.open(self._folder / "room.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)
            os.close(descriptor)

    def _scan(self, own: str) -> tuple[list[_Entry], int]:
        """All files and parts but those of `own`, and the bytes that others have promised beyond their parts."""
        found: dict[str, dict[str, _Entry]] = {}
        for folder in os.scandir(self._folder):
            for file in os.scandir(folder.path) if _FOLDER.fullmatch(folder.name) else ():
                name = _FILE.fullmatch(file.name)
                if name is None or name[1] == own:
                    continue
                try:
                    facts = file.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue  # just put in place, or thrown away
                found.setdefault(name[1], {})[name[2] or ""] = _Entry(name[1], Path(file.path), facts.st_size, facts.st_mtime_ns)
        entries: list[_Entry] = []
        promised = 0
        for kinds in found.values():
            entries += [entry for kind, entry in kinds.items() if kind != ".lock"]
            lock = kinds.get(".lock")
            if lock is not None and lock.size_bytes and _is_held(lock.path):
                come = sum(entry.size_bytes for kind, entry in kinds.items() if kind != ".lock")
                promised += max(0, _promise_bytes(lock.path) - come)
        return entries, promised

    def _evict(self, entries: list[_Entry], wanted_bytes: int) -> int:
        """Removes what was used least recently and nobody holds, until so many bytes are free; returns how many are."""
        freed = 0
        for entry in sorted(entries, key=lambda entry: entry.used_at_ns):
            if freed >= wanted_bytes:
                break
            if _removed(entry):
                freed += entry.size_bytes
        return freed


def _is_held(lock: Path) -> bool:
    """Whether a process holds this lock file."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _promise_bytes(lock: Path) -> int:
    text = lock.read_bytes()
    return int(text) if text.isdigit() else 0


def _removed(entry: _Entry) -> bool:
    """Whether a file could go: nobody reads it; or a part: nobody fetches it."""
    is_part = entry.path.suffix == ".part"
    guard = entry.path.with_suffix(".lock") if is_part else entry.path
    try:
        descriptor = os.open(guard, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if is_part else 0), 0o600)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        entry.path.unlink(missing_ok=True)
        if is_part:
            entry.path.with_name(entry.path.name + ".json").unlink(missing_ok=True)
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
