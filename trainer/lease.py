"""One run, one job: a lease on RUN_DIR that jobs on different hosts see (launch/run_lock.py covers one host). Free of torch."""

import fcntl
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

from data_shards.files import fsync_directory

logger = logging.getLogger(__name__)

_NAME = "lease.json"
_FILE_BYTES = 512
_TRIES = 10
_LOOKS = 4
"""In each stretch of renew_seconds; a lease of another host is watched for three of them."""


@final
@dataclass(frozen=True)
class LeaseRecord:
    """What stands in lease.json."""

    owner: str
    host: str
    pid_space: str
    """Within which a process id means one process: boot and PID namespace; host names repeat, in containers above all."""
    pid: int
    started: int
    """When the process started, in clock ticks after the boot: a process id is used again, the pair is not."""
    renewed: int = 0

    def to_bytes(self) -> bytes:
        """JSON of a fixed size, so that it can be renewed in place."""
        return json.dumps(asdict(self)).encode().ljust(_FILE_BYTES - 1) + b"\n"


@final
class Lease:
    """The right to write one RUN_DIR, held by the job whose rank 0 renews it. No two hosts' clocks are ever compared."""

    def __init__(self, path: Path, record: LeaseRecord, descriptor: int) -> None:
        """See take."""
        self._path, self._record, self._descriptor = path, record, descriptor

    @classmethod
    def take(cls, run_dir: Path, *, renew_seconds: float = 5.0) -> "Lease":
        """Take the run's lease; for rank 0 alone. One left by a dead job is taken over.

        A lease of another host is watched for 3 * renew_seconds to see whether somebody renews it.
        Raises: ValueError if another job holds the run; OSError."""
        path, pid = run_dir / _NAME, os.getpid()
        started = start_ticks(pid)
        assert started is not None, "a living process has a start time"
        record = LeaseRecord(uuid.uuid4().hex, socket.gethostname()[:64], _pid_space(), pid, started)
        for _ in range(_TRIES):
            descriptor = _create(path, record)
            if descriptor is not None:
                return cls(path, record, descriptor)
            found = _content(path)
            if found is not None and _is_dead(path, found, renew_seconds):
                _remove(path, found, by=record.owner)
        raise ValueError(f"{path}: other jobs are taking this run at this moment; let one of them have it, or give another --run-dir")

    def renew(self) -> None:
        """Show that this job lives; about every renew_seconds.

        Writes its own file only, which is no longer the run's once another job took over. Raises: OSError."""
        self._record = replace(self._record, renewed=self._record.renewed + 1)
        os.pwrite(self._descriptor, self._record.to_bytes(), 0)
        os.fsync(self._descriptor)

    def held(self) -> bool:
        """Whether the run is still this job's: the file is read afresh. Raises: OSError."""
        found = _content(self._path)
        # The owner comes first, and a renewal in this moment changes what comes last.
        return found is not None and found[:44] == self._record.to_bytes()[:44]

    def release(self) -> None:
        """Give the run free, if it is still this job's. Raises: OSError."""
        if self.held():
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)


def may_be_held(run_dir: Path) -> bool:
    """Whether a job may hold the run: there is a lease, and its job is not known to be dead. Raises: OSError."""
    found = _content(run_dir / _NAME)
    record = _record(found) if found is not None else None
    if record is None:
        return found is not None
    return record.pid_space != _pid_space() or start_ticks(record.pid) == record.started


def start_ticks(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot; None if it does not exist or is dead and only not yet reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def _pid_space() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"


def _create(path: Path, record: LeaseRecord) -> int | None:
    """The open file of a new lease; None if there is one already."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    except FileExistsError:
        return None
    os.pwrite(descriptor, record.to_bytes(), 0)
    os.fsync(descriptor)
    fsync_directory(path.parent)
    return descriptor


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _record(content: bytes) -> LeaseRecord | None:
    """The record; None for a file whose writer died at once, or is just writing it."""
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return None
    match fields:
        case {
            "owner": str(owner),
            "host": str(host),
            "pid_space": str(space),
            "pid": int(pid),
            "started": int(started),
            "renewed": int(renewed),
        }:
            return LeaseRecord(owner, host, space, pid, started, renewed)
    return None


def _is_dead(path: Path, found: bytes, renew_seconds: float) -> bool:
    """Whether nobody renews the lease; False if it changes hands meanwhile.

    Raises: ValueError if the job that holds it lives."""
    record = _record(found)
    if record is not None and record.pid_space == _pid_space():
        if start_ticks(record.pid) == record.started:
            raise _held_by(path, record)
        return True
    seconds, host = 3 * renew_seconds, record.host if record else "an unknown host"
    logger.warning("%s: a job of %s has held this run; watching for %g s whether it still does", path, host, seconds)
    waiting = threading.Event()
    for _ in range(3 * _LOOKS):
        waiting.wait(renew_seconds / _LOOKS)
        now = _content(path)
        if now != found:
            renewed = _record(now) if now is not None else None
            if record and renewed and renewed.owner == record.owner:
                raise _held_by(path, renewed)
            return False
    logger.warning("%s: taken over from the job of %s, which has not renewed it for %g s", path, host, seconds)
    return True


def _held_by(path: Path, holder: LeaseRecord) -> ValueError:
    return ValueError(
        f"{path}: process {holder.pid} on {holder.host} is running this run; wait for it, stop it there "
        f"(`kill -TERM {holder.pid}` lets it commit a checkpoint), or give another --run-dir"
    )


def _remove(path: Path, found: bytes, *, by: str) -> None:
    """Take a dead lease away; one that has come to life or changed hands meanwhile stays."""
    with _one_at_a_time(path.parent):
        if _content(path) != found:
            return
        taken = path.with_name(f".{path.name}.dead-{by}")
        try:
            os.rename(path, taken)
        except FileNotFoundError:
            return
        # Without locks between hosts it may have changed hands since it was read: its new holder gets it back.
        if _content(taken) == found:
            taken.unlink()
        else:
            os.rename(taken, path)


@contextmanager
def _one_at_a_time(directory: Path) -> Iterator[None]:
    """Hold the directory's lock, where the file system has one for directories."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
