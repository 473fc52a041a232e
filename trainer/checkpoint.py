"""Checkpoints that are whole or absent: safetensors and a JSON manifest, verified before a tensor reaches the model."""

import hashlib
import logging
import os
import re
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load as tensors_from_bytes
from safetensors.torch import save as tensors_to_bytes
from torch import Tensor

from data_shards.files import content_record, fsync_directory, json_text, read_json_object, write_durable

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
_NAME = re.compile(r"step_(\d{6,})")
_FILE = re.compile(r"[a-z_]+\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint whose files have been verified; `step` is the number of optimizer steps it holds."""

    step: int
    path: Path
    manifest: Mapping[str, object]


def write_checkpoint(run_dir: Path, step: int, *, parts: Mapping[str, Mapping[str, Tensor]], facts: Mapping[str, object]) -> Path:
    """Commit `checkpoints/step_NNNNNN`: temporary folder, fsync of each file, manifest, fsync, rename, fsync of the parent.

    parts: name of a file (without suffix) to its tensors by name. facts: what else the manifest holds (JSON values).
    A checkpoint of this step that is there already is kept as it is: it holds the same state."""
    parent = run_dir / "checkpoints"
    parent.mkdir(exist_ok=True)
    final = parent / f"step_{step:06d}"
    if final.exists():
        if _verified(final) is not None:
            return final
        _delete(final)
    temporary = parent / f"{final.name}.tmp-{uuid.uuid4().hex}"
    temporary.mkdir()
    files = {}
    for name, tensors in parts.items():
        content = tensors_to_bytes({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()})
        write_durable(temporary / f"{name}.safetensors", content)
        files[f"{name}.safetensors"] = content_record(content)
    manifest = {"schema_version": SCHEMA_VERSION, "step": step, **facts, "files": files}
    write_durable(temporary / "manifest.json", _sealed(manifest).encode())
    fsync_directory(temporary)
    os.rename(temporary, final)
    fsync_directory(parent)
    return final


def newest_checkpoint(run_dir: Path) -> Checkpoint | None:
    """The checkpoint with the most steps whose files all verify; a damaged one is named in the log and passed over."""
    for _, path in reversed(_committed(run_dir)):
        checkpoint = _verified(path)
        if checkpoint is not None:
            return checkpoint
    return None


def read_tensors(checkpoint: Checkpoint, part: str) -> dict[str, Tensor]:
    """The tensors of one file by name, on the CPU.

    Raises: ValueError if the file's hash is not the manifest's."""
    path = checkpoint.path / f"{part}.safetensors"
    content = path.read_bytes()
    if content_record(content) != _records(checkpoint.manifest)[path.name]:
        raise ValueError(f"{path}: changed since it was verified; run the same command again to fall back to an older checkpoint")
    return tensors_from_bytes(content)


def delete_old_checkpoints(run_dir: Path, *, newest: int, keep_last: int) -> None:
    """Delete all but the `keep_last` checkpoints up to step `newest`, which has just been committed, and what saves left unfinished.

    One of a later step was found damaged when this attempt began; kept, it would count as one of the last."""
    for step, path in _committed(run_dir):
        if step > newest:
            _delete(path)
    for _, path in _committed(run_dir)[:-keep_last]:
        _delete(path)
    for path in (run_dir / "checkpoints").glob("*.tmp-*"):
        shutil.rmtree(path)


def _committed(run_dir: Path) -> list[tuple[int, Path]]:
    """Folders with a checkpoint's name, oldest first."""
    parent = run_dir / "checkpoints"
    if not parent.is_dir():
        return []
    named = ((_NAME.fullmatch(path.name), path) for path in parent.iterdir())
    return sorted((int(match[1]), path) for match, path in named if match)


def _verified(path: Path) -> Checkpoint | None:
    """The checkpoint in `path`, or None, with the reason in the log, where a file is not what the manifest says."""
    try:
        manifest = _unsealed(path / "manifest.json")
        step = manifest["step"]
        if manifest["schema_version"] != SCHEMA_VERSION or not isinstance(step, int) or path.name != f"step_{step:06d}":
            raise ValueError(f"manifest.json is not one of {path.name} in schema {SCHEMA_VERSION}")
        for name, record in _records(manifest).items():
            _verify_file(path / name, record)
    except (OSError, KeyError, ValueError) as error:
        logger.warning("checkpoint %s is damaged and not used: %s", path, error)
        return None
    return Checkpoint(step=step, path=path, manifest=manifest)


def _sealed(manifest: Mapping[str, object]) -> str:
    """A manifest's text, closed by the hash of everything before it."""
    return json_text({**manifest, "manifest_sha256": hashlib.sha256(json_text(manifest).encode()).hexdigest()})


def _unsealed(path: Path) -> dict[str, object]:
    """The manifest in a file.

    Raises: ValueError if a single byte of it is not as it was written."""
    manifest = read_json_object(path)
    manifest.pop("manifest_sha256", None)
    if _sealed(manifest).encode() != path.read_bytes():
        raise ValueError("manifest.json was changed after it was written")
    return manifest


def _records(manifest: Mapping[str, object]) -> dict[str, Mapping[str, int | str]]:
    """The manifest's list of files: plain names only, so that none lies outside the checkpoint."""
    files = manifest["files"]
    if not isinstance(files, dict) or not all(_FILE.fullmatch(name) for name in files):
        raise ValueError("manifest.json: 'files' must map names like model.safetensors to their size and sha256")
    return files


def _verify_file(path: Path, record: Mapping[str, int | str]) -> None:
    size = path.stat().st_size
    if size != record["bytes"]:
        raise ValueError(f"{path.name} has {size} bytes, the manifest says {record['bytes']}")
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != record["sha256"]:
        raise ValueError(f"{path.name} has sha256 {digest}, the manifest says {record['sha256']}")


def _delete(path: Path) -> None:
    """Take a checkpoint's name away first: a half-deleted one must not look committed."""
    doomed = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)
