"""RUN_DIR must be one folder for all ranks: each leaves a token there and looks for the others'."""

import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path

from data_shards.files import fsync_directory, write_durable
from trainer import dist

_FOLDER = "heartbeats"
_PATIENCE_SECONDS = 65.0
"""By which a network file system shows a new name on another host; NFS clients may believe for 60 s that it is not there."""


def check_visible(run_dir: Path) -> None:
    """Return when every rank has seen every other rank's token in RUN_DIR. Collective.

    Raises: ValueError on all ranks, naming a host that sees another folder at this path, or none."""
    if dist.world_size() == 1:
        return
    rank, token = dist.rank(), uuid.uuid4().hex
    mine = run_dir / _FOLDER / f"token_{rank}_{token}"
    trouble = _leave(run_dir, mine)
    tokens = dist.all_gather_text(mine.name)
    hosts = dist.all_gather_text(socket.gethostname())
    unseen = [] if trouble else _unseen(mine.parent, tokens)
    found = dist.all_gather_text(trouble or ",".join(map(str, unseen)))
    with suppress(OSError):
        mine.unlink()
    if not any(found):
        return
    blind = {number: text for number, text in enumerate(found) if text}
    for number, text in blind.items():
        if not text.replace(",", "").isdecimal():
            raise ValueError(_message(run_dir, hosts[number], number, text))
    # The folder of rank 0 is the run's: who does not see its token looks at another one, or writes into another one.
    number, text = next(iter(blind.items()))
    other = int(text.split(",")[0])
    number, other = (other, number) if number == 0 else (number, other)
    raise ValueError(
        _message(run_dir, hosts[number], number, f"another folder: the file that rank {other} on {hosts[other]} wrote is not there")
    )


def _leave(run_dir: Path, mine: Path) -> str:
    """Write this rank's token; returns what stands in the way."""
    if not (run_dir / "recipe.yaml").exists():
        return "no run there" if run_dir.exists() else "no such folder"
    try:
        mine.parent.mkdir(exist_ok=True)
        write_durable(mine, b"")
        fsync_directory(mine.parent)
    except OSError as error:
        return f"cannot write there: {error.strerror}"
    return ""


def _unseen(folder: Path, tokens: list[str]) -> list[int]:
    """Ranks whose tokens do not appear."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    pause = threading.Event()
    while True:
        names = set(os.listdir(folder))
        unseen = [rank for rank, token in enumerate(tokens) if token not in names]
        if not unseen or time.monotonic() > deadline:
            return unseen
        pause.wait(0.5)


def _message(run_dir: Path, host: str, rank: int, what: str) -> str:
    return (
        f"{run_dir}: rank {rank} on {host} sees {what}; the run's folder must lie on a file system that every node mounts at the same "
        "path (NFS, Lustre, EFS, FSx): give such a --run-dir, or mount one (docs/clusters.md)"
    )
