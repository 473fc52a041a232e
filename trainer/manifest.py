"""Which checkpoints a run has: manifests sealed by hash, files verified, old ones deleted. Free of torch."""

import hashlib
import logging
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from data_shards.files import json_text, read_json_object, replace_file

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2
_NAME = re.compile(r"step_(\d{6,})")
_FILE = re.compile(r"[a-z0-9_]+\.safetensors")
_LARGEST_MANIFEST_BYTES = 1 << 28


@final
@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose manifest is whole; `step` is the number of optimizer steps it holds."""

    step: int
    path: Path
    manifest: Mapping[str, object]

    @property
    def sha256(self) -> str:
        """Of the manifest, and through it of every byte of the checkpoint."""
        return str(self.manifest["manifest_sha256"])

    @property
    def files(self) -> dict[str, Mapping[str, int | str]]:
        """Size and sha256 of each file by its plain name."""
        return _records(self.manifest)

    @property
    def size_bytes(self) -> int:
        """Of all its tensors' files."""
        return sum(int(record["bytes"]) for record in self.files.values())


def checkpoints_folder(run_dir: Path) -> Path:
    """Where a run's checkpoints lie, made if need be.

    Raises: ValueError if something else has its name."""
    parent = run_dir / "checkpoints"
    _check_plain(parent)
    parent.mkdir(exist_ok=True)
    return parent


def committed(run_dir: Path) -> list[tuple[int, Path]]:
    """Step and path of everything with a checkpoint's name, oldest first; nothing is read.

    Raises: ValueError if `checkpoints` is a link to elsewhere."""
    parent = run_dir / "checkpoints"
    _check_plain(parent)
    if not parent.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in parent.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def ever_committed(run_dir: Path) -> bool:
    """Whether this run has had a checkpoint, even if none is there any more."""
    return (run_dir / "latest.json").exists() or bool(committed(run_dir))


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint with the most steps whose files all verify; a damaged one is named in the log and passed over."""
    for _, path in reversed(committed(run_dir)):
        try:
            checkpoint = read_checkpoint(path)
            verify_files(checkpoint, checkpoint.files)
        except ValueError as error:
            logger.warning("checkpoint %s is damaged and not used: %s", path, error)
            continue
        return checkpoint
    return None


def is_last(checkpoint: Checkpoint, total_steps: int) -> bool:
    """Whether a run of `total_steps` ends with this checkpoint: it has them all, or its student had learnt enough before."""
    return checkpoint.step >= total_steps or checkpoint.manifest.get("learnt_enough") is True


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, its manifest checked, its other files not yet.

    Raises: ValueError if a single byte of the manifest is not as it was written, or the folder is a link to elsewhere."""
    try:
        is_folder = stat.S_ISDIR(os.lstat(path).st_mode)
    except OSError as error:  # deleted by the run that it belongs to, for example
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    if not is_folder:
        raise ValueError(f"{path.name} is not a folder of its own (a link leads elsewhere)")
    manifest = _unsealed(path / "manifest.json")
    step = manifest.get("step")
    if manifest.get("schema_version") != SCHEMA_VERSION or not isinstance(step, int) or path.name != f"step_{step:06d}":
        raise ValueError(f"manifest.json is not one of {path.name} in schema {SCHEMA_VERSION}")
    _records(manifest)
    return Checkpoint(step=step, path=path, manifest=manifest)


def verify_files(checkpoint: Checkpoint, names: Iterable[str]) -> None:
    """Compare size and sha256 of files with the manifest.

    Raises: ValueError naming the first file that is not what the manifest says."""
    for name in names:
        try:
            _verify_file(checkpoint.path / name, checkpoint.files[name])
        except OSError as error:
            raise ValueError(f"{name} cannot be read: {error.strerror}") from error


def seal(manifest: Mapping[str, object]) -> str:
    """A manifest's text, closed by the hash of everything before it."""
    return json_text({**manifest, "manifest_sha256": hashlib.sha256(json_text(manifest).encode()).hexdigest()})


def note_latest(run_dir: Path, step: int) -> None:
    """Leave a trace that step `step` was committed. A hint for people, and proof that there was something to resume; never the truth."""
    replace_file(run_dir / "latest.json", json_text({"step": step, "path": f"checkpoints/step_{step:06d}"}))


def sweep_leftovers(run_dir: Path) -> None:
    """Remove what saves and deletions left unfinished; only the one job that writes this run may."""
    for path in (run_dir / "checkpoints").glob("*.tmp-*"):
        _remove(path)


def delete(path: Path) -> None:
    """Take a checkpoint's name away first: a half-deleted one must not look committed."""
    doomed = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    os.rename(path, doomed)
    _remove(doomed)


@final
class Retention:
    """Which checkpoints stay: the last ones, every n-th, the best, a finished stage's; never fewer than two that are good."""

    def __init__(self, *, keep_last: int, keep_every_steps: int | None, keep_best: int, good: Iterable[int] = ()) -> None:
        """good: steps of checkpoints that this process has verified or written."""
        self.keep_last, self.keep_every_steps, self.keep_best = keep_last, keep_every_steps, keep_best
        self.good = set(good)

    def delete_old(self, run_dir: Path, *, newest: int) -> None:
        """Delete what need not stay beside checkpoint `newest`, which has just been committed.

        One of a later step was found damaged when this attempt began; kept, it would count as one of the last. Those that are to
        stay because they are among the last are verified before anything is deleted, if nobody has done so yet."""
        self.good.add(newest)
        for step, path in committed(run_dir):
            if step > newest:
                delete(path)
        found = committed(run_dir)
        stay, counted = self._last_good(found)
        if len(found) <= counted:
            return
        facts = {step: _facts(path) for step, path in found}
        losses = {step: loss for step, fact in facts.items() if isinstance(loss := fact.get("mean_loss"), int | float)}
        stay |= set(sorted(losses, key=lambda step: (losses[step], step))[: self.keep_best])
        stay |= {step for step, fact in facts.items() if fact.get("final") is True}
        stay |= {step for step in facts if self.keep_every_steps is not None and step % self.keep_every_steps == 0}
        for step, path in found:
            if step not in stay:
                delete(path)

    def _last_good(self, found: Sequence[tuple[int, Path]]) -> tuple[set[int], int]:
        """The steps of the newest `keep_last` checkpoints that verify, and how many they are; fewer where there are not so many.

        Beside them are those that cannot be read at this moment: nobody knows that they are damaged."""
        last: set[int] = set()
        unreadable: set[int] = set()
        for step, path in reversed(found):
            if len(last) == self.keep_last:
                break
            if step not in self.good:
                try:
                    checkpoint = read_checkpoint(path)
                    verify_files(checkpoint, checkpoint.files)
                except ValueError as error:
                    logger.warning("checkpoint %s is damaged; it does not count as one of the last: %s", path, error)
                    if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
                        unreadable.add(step)
                    continue
                self.good.add(step)
            last.add(step)
        return last | unreadable, len(last)


def _check_plain(parent: Path) -> None:
    if parent.is_symlink() or (parent.exists() and not parent.is_dir()):
        raise ValueError(f"{parent}: is not a plain folder; move it away, checkpoints are written there")


def _remove(path: Path) -> None:
    """A folder with all that is in it; of a link, itself."""
    if path.is_symlink() or not path.is_dir():
        path.unlink()
    else:
        shutil.rmtree(path)


def _facts(path: Path) -> Mapping[str, object]:
    """What a checkpoint's manifest says; nothing where it is damaged."""
    try:
        return read_checkpoint(path).manifest
    except ValueError:
        return {}


def _unsealed(path: Path) -> dict[str, object]:
    content = _plain_bytes(path)
    try:
        manifest = read_json_object(path)
        manifest.pop("manifest_sha256", None)
        text = seal(manifest)
    except (ValueError, RecursionError) as error:  # Python's JSON takes NaN, and gives up on bottomless lists
        raise ValueError(f"manifest.json is not one that was ever written: {error}") from error
    if text.encode() != content:
        raise ValueError("manifest.json was changed after it was written")
    manifest["manifest_sha256"] = hashlib.sha256(json_text(manifest).encode()).hexdigest()
    return manifest


def _plain_bytes(path: Path) -> bytes:
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode) or status.st_size > _LARGEST_MANIFEST_BYTES:
            raise ValueError(f"{path.name} is not a plain file of at most {_LARGEST_MANIFEST_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error


def _records(manifest: Mapping[str, object]) -> dict[str, Mapping[str, int | str]]:
    """The manifest's list of files: plain names only, so that none lies outside the checkpoint."""
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(_FILE.fullmatch(name) for name in files):
        raise ValueError("manifest.json: 'files' must map names like rank_0000.safetensors to their size and sha256")
    if not all(isinstance(record, dict) and isinstance(record.get("bytes"), int) for record in files.values()):
        raise ValueError("manifest.json: every file needs its size in bytes and its sha256")
    return files


def _verify_file(path: Path, record: Mapping[str, int | str]) -> None:
    status = os.lstat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path.name} is not a plain file")
    if status.st_size != record["bytes"]:
        raise ValueError(f"{path.name} has {status.st_size} bytes, the manifest says {record['bytes']}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != record.get("sha256"):
        raise ValueError(f"{path.name} has sha256 {digest}, the manifest says {record.get('sha256')}")
