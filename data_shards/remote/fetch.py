"""Brings one file from a store to a local path: whole, checked and durable, going on where a broken transfer stopped."""

import hashlib
import json
import os
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import final

from data_shards.files import fsync_directory, replace_file
from data_shards.remote.locations import Location
from data_shards.remote.object_store import open_object
from data_shards.remote.retry import OfflineError, RefusedError, RetryPolicy, StoppedError, TryAgainError, retried
from data_shards.remote.transport import BLOCK_BYTES, Body, open_http

OFFLINE_VARIABLES = ("HALFSTEP_OFFLINE", "HF_HUB_OFFLINE")
DEFAULT_POLICY = RetryPolicy()
_HEAD_BYTES = 512
_MEND = "check the network and the store; what has come is kept, and the next start goes on from there"


@final
@dataclass(frozen=True)
class Fetched:
    """A file that arrived. came_bytes: over the network, repeats too. resumed_bytes: there already from an earlier process."""

    size_bytes: int
    sha256: str
    etag: str | None
    came_bytes: int
    resumed_bytes: int


@final
@dataclass(frozen=True)
class Small:
    """A small file in memory, and the tag to ask with whether it is still the same."""

    content: bytes
    etag: str | None


@final
@dataclass(frozen=True)
class _Wanted:
    size_bytes: int | None
    sha256: str | None


def fetch(location: Location, path: Path, *, size_bytes: int | None, sha256: str | None, policy: RetryPolicy = DEFAULT_POLICY) -> Fetched:
    """Puts the file of a remote location at `path`, or leaves `path` alone; what has come lies in `path`.part until then.

    Only one process at a time may fetch to a path: callers hold a lock.
    Raises: FetchError (one of its kinds in retry.py); OSError of the local disk; ValueError if the location is local.
    """
    _check_fetchable(location)
    wanted = _Wanted(size_bytes, sha256)
    with closing(_Part(path, location, wanted)) as part:

        def attempt(deadline: float) -> Fetched:
            try:
                _receive(location, part, wanted, policy, deadline)
            except TryAgainError as error:
                if error.from_zero:
                    part.restart(None)
                raise
            return part.finish()

        return retried(attempt, what=str(location), policy=policy, mend=_MEND)


def fetch_small(location: Location, *, limit_bytes: int, etag: str | None = None, policy: RetryPolicy = DEFAULT_POLICY) -> Small | None:
    """A file of at most `limit_bytes`; None if the store says that it is still the one of `etag`. Raises: as `fetch`."""
    _check_fetchable(location)

    def attempt(deadline: float) -> Small | None:
        body = _open(location, 0, None, etag, policy, deadline)
        if body is None:
            return None
        content = bytearray()
        with closing(body):
            if body.total_bytes is not None and body.total_bytes > limit_bytes:
                raise RefusedError(f"{location}: has {body.total_bytes} bytes, at most {limit_bytes} are read; is it the right file?")
            while block := body.read():
                content += block
                if len(content) > limit_bytes:
                    raise RefusedError(f"{location}: more than {limit_bytes} bytes came, at most that many are read; is it the right file?")
                _check_time(location, policy, deadline)
        if body.total_bytes is not None and len(content) < body.total_bytes:
            raise TryAgainError(f"the transfer ended after {len(content)} of {body.total_bytes} bytes")
        return Small(bytes(content), body.etag)

    return retried(attempt, what=str(location), policy=policy, mend="check the network and the store")


def offline_variable() -> str | None:
    """The environment variable that forbids the network, if one does."""
    return next((name for name in OFFLINE_VARIABLES if os.environ.get(name, "").lower() in ("1", "true", "yes", "on")), None)


def _check_fetchable(location: Location) -> None:
    if not location.is_remote:
        raise ValueError(f"{location}: is a local path and needs no fetch; open it")
    name = offline_variable()
    if name is not None:
        raise OfflineError(
            f"{location}: not in the cache, and {name}={os.environ[name]} forbids the network; unset it, or copy the shards here"
        )


def _open(location: Location, offset: int, etag: str | None, known_etag: str | None, policy: RetryPolicy, deadline: float) -> Body | None:
    if location.scheme not in ("hf", "http", "https"):
        return open_object(location, offset=offset, etag=etag, known_etag=known_etag)
    stall_seconds = max(0.001, min(policy.stall_seconds, deadline - policy.clock()))
    return open_http(location, offset=offset, etag=etag, known_etag=known_etag, stall_seconds=stall_seconds)


def _check_time(location: Location, policy: RetryPolicy, deadline: float) -> None:
    if policy.stop():
        raise StoppedError(f"{location}: stopped by the caller")
    if policy.clock() >= deadline:
        raise TryAgainError(f"the {policy.deadline_seconds:.0f} s for a file are used up")


def _receive(location: Location, part: "_Part", wanted: _Wanted, policy: RetryPolicy, deadline: float) -> None:
    """One attempt: what is missing of the part, then the comparison with what is wanted. Raises: TryAgainError, RefusedError."""
    if part.size_bytes != wanted.size_bytes:
        body = _open(location, part.size_bytes, part.etag, None, policy, deadline)
        if body is None:
            raise TryAgainError("the store says `not modified` to a question that was not asked")
        with closing(body):
            limit = wanted.size_bytes if wanted.size_bytes is not None else body.total_bytes
            if limit is None:
                raise RefusedError(f"{location}: the store does not say how long the file is, nor does an index; it could fill the disk")
            if body.total_bytes is not None and body.total_bytes != limit:
                # Before the part is touched: a proxy's page in the file's stead must not cost what has come so far.
                kind = _kind(body.read()[:_HEAD_BYTES]) if body.start == 0 else part.kind()
                reason = f"a file of {body.total_bytes} bytes ({kind}), wanted {limit}"
                raise TryAgainError(reason, wrong_content=True, from_zero=body.start > 0)
            if body.start == 0:
                part.restart(body.etag)
            while block := body.read():
                if part.size_bytes + len(block) > limit:
                    raise TryAgainError(f"more bytes than the {limit} wanted ({part.kind()}); cut off", wrong_content=True, from_zero=True)
                part.append(block)
                _check_time(location, policy, deadline)
            if part.size_bytes < limit:
                raise TryAgainError(f"the transfer ended after {part.size_bytes} of {limit} bytes ({part.kind()})")
    if wanted.sha256 is not None and part.sha256() != wanted.sha256:
        reason = f"{part.size_bytes} bytes of sha256 {part.sha256()[:12]} ({part.kind()}), wanted sha256 {wanted.sha256[:12]}"
        raise TryAgainError(reason, wrong_content=True, from_zero=True)


def _kind(head: bytes) -> str:
    """What a file begins like, for an error message."""
    text = head.lstrip()[:64].lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page"
    if text.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer"
    kinds = {b"<?xml": "XML", b"<": "markup", b"{": "JSON", b"\x1f\x8b": "gzip", b"pk\x03\x04": "zip"}
    found = next((kind for start, kind in kinds.items() if text.startswith(start)), None)
    if found is not None:
        return found
    if head[257:262] == b"ustar":
        return "a tar"
    return f"beginning with {head[:8].hex()}" if head else "unread"


@final
class _Part:
    """What has come of a file: `PATH.part`, its running sha256, and in `PATH.part.json` the ETag that it belongs to."""

    def __init__(self, path: Path, location: Location, wanted: _Wanted) -> None:
        self._target = path
        self._path = path.with_name(path.name + ".part")
        self._note = path.with_name(path.name + ".part.json")
        self._identity = hashlib.sha256(location.identity.encode()).hexdigest()
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._came_bytes = 0
        self._hash = hashlib.sha256()
        self.size_bytes = 0
        self.etag = self._noted_etag()
        present = os.fstat(self._file).st_size
        if self.etag is None or (wanted.size_bytes is not None and present > wanted.size_bytes):
            self.restart(None)
        else:
            while block := os.pread(self._file, BLOCK_BYTES, self.size_bytes):
                self._hash.update(block)
                self.size_bytes += len(block)
        self._resumed_bytes = self.size_bytes

    def _noted_etag(self) -> str | None:
        """The ETag of an earlier process's part, if it came from this location."""
        try:
            note = json.loads(self._note.read_bytes())
            return note["etag"] if note["location"] == self._identity and isinstance(note["etag"], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # none, or cut by a crash: the file comes from zero

    def restart(self, etag: str | None) -> None:
        """Throws away what has come; what comes next belongs to `etag`, without which it can't be gone on with."""
        os.ftruncate(self._file, 0)
        self._hash, self.size_bytes, self._resumed_bytes = hashlib.sha256(), 0, 0
        self.etag = etag
        if etag is None:
            self._note.unlink(missing_ok=True)
        else:
            replace_file(self._note, json.dumps({"location": self._identity, "etag": etag}))

    def append(self, block: bytes) -> None:
        """Writes the next bytes. Raises: OSError of the disk; what was written before stays good."""
        self._came_bytes += len(block)
        rest = memoryview(block)
        while rest:
            written = os.pwrite(self._file, rest, self.size_bytes)
            self._hash.update(rest[:written])
            self.size_bytes += written
            rest = rest[written:]

    def sha256(self) -> str:
        """Of what has come."""
        return self._hash.hexdigest()

    def kind(self) -> str:
        """What it begins like."""
        return _kind(os.pread(self._file, _HEAD_BYTES, 0))

    def finish(self) -> Fetched:
        """Makes the part durable and puts it in place."""
        os.fsync(self._file)
        os.replace(self._path, self._target)
        self._note.unlink(missing_ok=True)
        fsync_directory(self._target.parent)
        return Fetched(self.size_bytes, self.sha256(), self.etag, self._came_bytes, self._resumed_bytes)

    def close(self) -> None:
        """Leaves the part for the next process, if anything has come."""
        os.close(self._file)
        if not self.size_bytes:
            self._path.unlink(missing_ok=True)
            self._note.unlink(missing_ok=True)
