"""`halfstep shards index`: tars that others wrote, indexed once, and in plain words what of them is not used."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.progress import pack_progress


def index_shards(tars: Sequence[str], out: Path, *, licence: str, workers: int) -> str:
    """Index tars and write to stderr what is left out; returns a line that says what the index holds.

    Raises: ValueError naming each tar that is refused, or if OUT holds another index."""
    from data_shards.tars.index_tars import index_tars

    with pack_progress("indexing tars") as progress:
        found = index_tars(tars, out, licence=licence, workers=workers, progress=progress)
    for line in found.named:
        sys.stderr.write(f"not used: {line}\n")
    if found.left_out:
        sys.stderr.write(f"left out: {_counted(found.left_out)}\n")
    for extension, count in found.ignored.items():
        sys.stderr.write(f"ignored: {count} members of extension {extension!r}, such as {found.examples[extension]}\n")
    index = found.index
    size = f"{index.image_size} x {index.image_size} pixels" if index.image_size is not None else "several sizes"
    where = f", tars at {index.location}" if index.location is not None else ""
    return f"{out}: {index.samples} images of {size} in {len(index.shards)} tars{where}"


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda item: -item[1]))
