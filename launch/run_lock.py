"""One run, one command: a lock on RUN_DIR that lives as long as the command or any of its ranks."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NAME = ".lock"
_TRIES, _PAUSE_SECONDS = 10, 0.1  # `halfstep status` holds the lock for an instant to see whether it is free


@contextmanager
def locked(run_dir: Path) -> Iterator[int]:
    """Hold the lock of RUN_DIR, which is made if need be; gives the descriptor that ranks inherit, so that orphans hold it too.

    Raises: ValueError if another command or its ranks hold it."""
    run_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run_dir / _NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if not any(_take(descriptor, number) for number in range(_TRIES)):
            raise ValueError(f"{run_dir}: another process is running this run; wait for it, stop it, or give another --run-dir")
        yield descriptor
    finally:
        os.close(descriptor)


def is_locked(run_dir: Path) -> bool:
    """Whether a command or one of its ranks holds the lock of RUN_DIR."""
    if not (run_dir / _NAME).exists():
        return False
    descriptor = os.open(run_dir / _NAME, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


def _take(descriptor: int, number: int) -> bool:
    """One try, after a pause if it is not the first."""
    if number:
        time.sleep(_PAUSE_SECONDS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
