"""Which checkpoints a run or a chain has, and whether they are whole. Free of torch."""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from data_shards.files import json_text
from trainer.chain import read_chain
from trainer.exit_codes import DONE
from trainer.manifest import Checkpoint, committed, read_checkpoint, verify_files

_DAMAGED = 2
_UNFINISHED = re.compile(r"step_(\d{6,12})\.tmp-[0-9a-f]{32}")
_HEADINGS = ("step", "written (UTC)", "size", "ranks", "engine", "mean loss", "marks", "state")


@dataclass(frozen=True)
class Entry:
    """One checkpoint, or a save that is not finished; what its manifest does not say is None."""

    step: int
    written_at: str
    size_bytes: int
    world_size: int | None
    engine: str | None
    mean_loss: float | None
    marks: tuple[str, ...]
    state: str
    """whole; unfinished; damaged: and what is wrong."""


def print_checkpoints(run_dir: Path, *, verify: bool, as_json: bool) -> int:
    """Write a list of the checkpoints of a run, or of each stage of a chain, to stdout; 2 if `verify` found damage, else 0.

    verify: hash every byte; otherwise manifests and sizes are compared only.
    Raises: ValueError if `run_dir` is neither."""
    runs = [(run, _entries(run, verify=verify)) for run in _runs(run_dir)]
    if as_json:
        listed = [{"run_dir": str(run), "checkpoints": [asdict(entry) for entry in entries]} for run, entries in runs]
        sys.stdout.write(json_text({"verified": verify, "runs": listed}))
    else:
        sys.stdout.write("\n".join(_table(run, entries) for run, entries in runs) + _foot(verify=verify))
    damaged = any(entry.state.startswith("damaged") for _, entries in runs for entry in entries)
    return _DAMAGED if verify and damaged else DONE


def _runs(path: Path) -> list[Path]:
    if (path / "chain.json").exists():
        return [stage.run_dir for stage in read_chain(path) if stage.trained_here and stage.run_dir.is_dir()]
    if not (path / "recipe.yaml").exists() and not (path / "checkpoints").is_dir():
        raise ValueError(f"{path}: neither recipe.yaml, chain.json nor checkpoints/ there; wanted a RUN_DIR or a chain's directory")
    return [path]


def _entries(run_dir: Path, *, verify: bool) -> list[Entry]:
    """Committed checkpoints, then unfinished saves, each by step; the newest whole one is marked."""
    found = [_entry(step, path, verify=verify) for step, path in committed(run_dir)]
    newest = max((number for number, entry in enumerate(found) if entry.state == "whole"), default=None)
    marked = [_marked(entry, "newest") if number == newest else entry for number, entry in enumerate(found)]
    return [*marked, *_unfinished(run_dir)]


def _entry(step: int, path: Path, *, verify: bool) -> Entry:
    state, checkpoint = "whole", None
    try:
        checkpoint = read_checkpoint(path)
        if verify:
            verify_files(checkpoint, checkpoint.files)
        else:
            _check_sizes(checkpoint)
    except ValueError as error:
        state = f"damaged: {_plain(str(error))}"
    manifest = checkpoint.manifest if checkpoint else {}
    world_size, engine, mean_loss = manifest.get("world_size"), manifest.get("engine"), manifest.get("mean_loss")
    return Entry(
        step=step,
        written_at=_written_at(path),
        size_bytes=checkpoint.size_bytes if checkpoint else _size_bytes(path),
        world_size=world_size if isinstance(world_size, int) else None,
        engine=_plain(engine) if isinstance(engine, str) else None,
        mean_loss=float(mean_loss) if isinstance(mean_loss, int | float) else None,
        marks=("final",) if manifest.get("final") is True else (),
        state=state,
    )


def _check_sizes(checkpoint: Checkpoint) -> None:
    """Raises: ValueError naming the first file that is missing or has another size."""
    for name, record in checkpoint.files.items():
        try:
            size = os.lstat(checkpoint.path / name).st_size
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error
        if size != record["bytes"]:
            raise ValueError(f"{name} has {size} bytes, the manifest says {record['bytes']}")


def _unfinished(run_dir: Path) -> Iterator[Entry]:
    for path in sorted((run_dir / "checkpoints").glob("step_*.tmp-*")):
        if match := _UNFINISHED.fullmatch(path.name):
            yield Entry(int(match[1]), _written_at(path), _size_bytes(path), None, None, None, (), "unfinished")


def _marked(entry: Entry, mark: str) -> Entry:
    return Entry(**{**asdict(entry), "marks": (mark, *entry.marks)})


def _written_at(path: Path) -> str:
    """When a folder was last changed, without following a link; it may be deleted at this moment."""
    try:
        seconds = os.lstat(path).st_mtime
    except OSError:
        return "?"
    return datetime.fromtimestamp(seconds, UTC).isoformat(sep=" ", timespec="seconds").removesuffix("+00:00")


def _size_bytes(path: Path) -> int:
    """Of the plain files in a folder, links apart; it may be renamed or deleted at this moment."""
    if path.is_symlink() or not path.is_dir():
        return 0
    try:
        return sum(entry.stat(follow_symlinks=False).st_size for entry in os.scandir(path) if entry.is_file(follow_symlinks=False))
    except OSError:
        return 0


def _table(run_dir: Path, entries: Sequence[Entry]) -> str:
    if not entries:
        return f"{run_dir}: no checkpoints yet\n"
    rows = [_HEADINGS, *(_row(entry) for entry in entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS) - 1)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]) for row in rows]
    whole = sum(entry.state == "whole" for entry in entries)
    free_gib = shutil.disk_usage(run_dir).free / 2**30
    head = f"{run_dir}: {whole} whole of {len(entries)}; {free_gib:.1f} GiB are free there"
    return "".join(f"{line.rstrip()}\n" for line in (head, *lines))


def _row(entry: Entry) -> tuple[str, ...]:
    return (
        str(entry.step),
        entry.written_at,
        f"{entry.size_bytes / 2**20:.1f} MiB",
        "-" if entry.world_size is None else str(entry.world_size),
        entry.engine or "-",
        "-" if entry.mean_loss is None else f"{entry.mean_loss:.5g}",
        ", ".join(entry.marks) or "-",
        entry.state,
    )


def _foot(*, verify: bool) -> str:
    return "every byte was read and compared\n" if verify else "manifests and sizes were compared; --verify reads every byte\n"


def _plain(text: str) -> str:
    """Text from a file that anyone may have written, without what moves a terminal's cursor."""
    return "".join(character if character.isprintable() else "?" for character in text)
