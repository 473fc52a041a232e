"""RUN_DIR must be one folder for all ranks: each leaves a token there and looks for the others'."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from data_shards import ranks
from data_shards.derive.request import REQUEST_NAME
from data_shards.files import fsync_directory, write_durable

_FOLDER = "heartbeats"
PATIENCE_SECONDS = 65.0
"""By which a network file system shows a new name on another host; NFS clients may believe for 60 s that it is not there."""


def check_visible(run_dir: Path, *, patience_seconds: float = PATIENCE_SECONDS) -> None:
    """Return when every rank has seen every other rank's token in RUN_DIR. Collective.

    patience_seconds: how long a token may take to appear.
    Raises: ValueError on all ranks, naming a host that sees another folder at this path, or none."""
    if ranks.world_size() == 1:
        return
    mine = run_dir / _FOLDER / f"token_{ranks.rank()}_{uuid.uuid4().hex}"
    trouble = _leave(run_dir, mine)
    tokens = ranks.all_gather_text(mine.name)
    hosts = ranks.all_gather_text(socket.gethostname())
    troubles = ranks.all_gather_text(trouble)
    unseen = [] if any(troubles) else _unseen(mine.parent, tokens, patience_seconds)
    missed = [[int(number) for number in text.split()] for text in ranks.all_gather_text(" ".join(map(str, unseen)))]
    with suppress(OSError):
        mine.unlink()
    if found := at_fault(troubles, missed, hosts):
        rank, what = found
        raise ValueError(
            f"{run_dir}: rank {rank} on {hosts[rank]} sees {what}; the run's folder must lie on a file system that every node mounts "
            "at the same path (NFS, Lustre, EFS, FSx): give such a --run-dir, or mount one (docs/clusters.md)"
        )


def at_fault(troubles: Sequence[str], missed: Sequence[Sequence[int]], hosts: Sequence[str]) -> tuple[int, str] | None:
    """The first rank that does not share the folder, and what it sees instead; None if all do. Each argument by rank.

    troubles: what kept a rank from writing its token. missed: the ranks whose tokens it did not find."""
    for rank, trouble in enumerate(troubles):
        if trouble:
            return rank, trouble
    for rank, others in enumerate(missed):
        if others:
            # The folder of rank 0 is the run's: who does not share it looks at another one.
            rank, other = (others[0], rank) if rank == 0 else (rank, others[0])
            return rank, f"another folder: the file that rank {other} on {hosts[other]} wrote is not there"
    return None


def _leave(run_dir: Path, mine: Path) -> str:
    """Write this rank's token; returns what stands in the way."""
    try:
        if not any((run_dir / name).exists() for name in ("recipe.yaml", REQUEST_NAME)):
            return "no run there" if run_dir.exists() else "no such folder"
        mine.parent.mkdir(exist_ok=True)
        write_durable(mine, b"")
        fsync_directory(mine.parent)
    except OSError as error:
        return f"a folder that it cannot write into ({error.strerror})"
    return ""


def _unseen(folder: Path, tokens: Sequence[str], patience_seconds: float) -> list[int]:
    """Ranks whose tokens do not appear."""
    deadline = time.monotonic() + patience_seconds
    pause = threading.Event()
    while True:
        names = set(os.listdir(folder))
        unseen = [rank for rank, token in enumerate(tokens) if token not in names]
        if not unseen or time.monotonic() > deadline:
            return unseen
        pause.wait(0.5)
