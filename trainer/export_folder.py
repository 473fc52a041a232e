"""Folders of exports: written whole or not at all, sealed by a manifest, handed on without this machine's paths, pushed to the Hub."""

import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

from data_shards.files import fsync_directory, json_text, read_json_object, write_durable
from trainer.config import ProgressiveDistillationConfig, RunConfig
from trainer.config_latent import LatentDenoisingConfig, LatentHalvingConfig

SCHEMA_VERSION = 1
LORA_FILE = "pytorch_lora_weights.safetensors"
HUB_ID = re.compile(r"(?!runs/|shards/)[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
"""owner/name or owner/name@revision; what lies in halfstep's own folders is none, even where it is missing."""
_FREE = (".md", ".png")
"""Endings of files that may be changed in an export: its card and its pictures are for readers."""


def write_folder(out: Path, fill: Callable[[Path], None]) -> Path:
    """Let `fill` write a new folder and give it the name `out`; an older export there is replaced.

    Raises: ValueError if `out` is something other than an export, which is never overwritten."""
    if out.exists() and not is_export(out) and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not an export and not empty; give --out another name or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex}")
    try:
        fill(temporary)
        _commit(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


def is_export(folder: Path) -> bool:
    """Whether a folder is an export: of a pipeline, or of an adapter."""
    return (folder / "model_index.json").exists() or ((folder / "descriptor.json").exists() and (folder / "manifest.json").exists())


def seal(folder: Path, facts: Mapping[str, object]) -> None:
    """Write manifest.json, with the facts and every file's size and sha256, and wait until the disk holds the folder."""
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    manifest = {"schema_version": SCHEMA_VERSION, **facts, "files": {name: _record(folder / name) for name in names}}
    write_durable(folder / "manifest.json", json_text(manifest).encode())
    # fsync of a file is the same call as of a directory: on the descriptor of whatever the name opens.
    for path in (*folder.rglob("*"), folder):
        fsync_directory(path)


def whole_manifest(folder: Path) -> Mapping[str, object] | None:
    """An export's manifest; None where there is no whole export."""
    try:
        return verified_manifest(folder)
    except ValueError:
        return None


def verified_manifest(folder: Path) -> Mapping[str, object]:
    """An export's manifest, all of whose files but the card and pictures have been read and compared with it.

    Raises: ValueError naming the file that is missing or changed."""
    manifest = read_json_object(folder / "manifest.json")
    records = manifest.get("files")
    if not isinstance(records, dict):
        raise ValueError(f"{folder / 'manifest.json'}: 'files' is not an object; export the run again")
    for name, wanted in records.items():
        file = folder / name
        if ".." in Path(name).parts or Path(name).is_absolute():
            raise ValueError(f"{folder / 'manifest.json'}: lists {name}, which is not in the folder; export the run again")
        if file.suffix in _FREE:
            continue
        found = _record(file) if file.is_file() else "missing"
        if found != wanted:
            raise ValueError(f"{file}: is {found}, manifest.json says {wanted}; it is damaged or was edited: export the run again")
    return manifest


def exported_sha256(folder: Path) -> str | None:
    """sha256 of the weights that an export holds; None where there is no whole export."""
    return _fact(folder, "weights_sha256")


def exported_checkpoint(folder: Path) -> str | None:
    """sha256 of the checkpoint that an export was made from; None where there is no whole export of one."""
    return _fact(folder, "checkpoint_sha256")


def portable_recipe(recipe: RunConfig) -> RunConfig:
    """A recipe to hand on: of data, teacher and local models the folders' names, not where they lie on this machine."""
    data = recipe.data.model_copy(
        update={
            "shards": recipe.data.shards and Path(recipe.data.shards).name,
            "mixture": tuple(source.model_copy(update={"shards": Path(source.shards).name}) for source in recipe.data.mixture),
        }
    )
    local = ("base", "autoencoder", "image_encoder", "decoder", "prior", "start")
    names = {name: public_name(value) for name in local if isinstance(value := getattr(recipe.model, name, None), str)}
    clip = recipe.validation.clip
    recipe = recipe.model_copy(
        update={
            "data": data,
            "model": recipe.model.model_copy(update=names),
            "validation": recipe.validation.model_copy(update={"clip": clip and public_name(clip)}),
        }
    )
    return with_teacher_path(recipe, lambda teacher: Path(teacher).name)


def with_teacher_path(recipe: RunConfig, changed: Callable[[str], str]) -> RunConfig:
    """A recipe with another path to its teacher, where it has one."""
    match recipe.objective:
        case ProgressiveDistillationConfig(teacher=teacher) as objective:
            update: dict[str, object] = {"teacher": changed(teacher)}
        case LatentDenoisingConfig(halving=LatentHalvingConfig(teacher=teacher) as halving) as objective:
            update = {"halving": halving.model_copy(update={"teacher": changed(teacher)})}
        case _:
            return recipe
    return recipe.model_copy(update={"objective": objective.model_copy(update=update)})


def public_name(model: str) -> str:
    """What others know a model by: its Hub id, or the name of its folder."""
    return model if is_hub_id(model) else Path(model).resolve().name


def is_hub_id(model: str) -> bool:
    """Whether a model's name is of the Hub: owner/name, and no folder here."""
    return HUB_ID.fullmatch(model) is not None and not Path(model).exists()


def push_export(folder: Path, repository: str, *, endpoint: str | None = None) -> str:
    """Upload an export to a model repository of the Hugging Face Hub, made where there is none; returns its address.

    endpoint: the Hub's address; None for huggingface_hub's own. The token is that of `hf auth login` or of the environment; it is
    read by huggingface_hub alone.
    Raises: RuntimeError if the Hub cannot be reached or refuses; ValueError if `repository` is not owner/name."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise RuntimeError("--push needs huggingface_hub: pip install 'halfstep[hub]'") from error
    try:
        hub = huggingface_hub.HfApi(endpoint=endpoint)
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by halfstep")
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: wanted owner/name: {_first_line(error)}") from error
    # The Hub's client has two transports with unrelated exceptions; whatever went wrong, the export itself is whole.
    except Exception as error:
        raise RuntimeError(
            f"--push {repository}: the Hub was not reached or refused: {type(error).__name__}: {_first_line(error)}; "
            f"the export is complete in {folder}: log in with `hf auth login`, then run the same command again"
        ) from None
    return f"https://huggingface.co/{repository}"


def _commit(temporary: Path, out: Path) -> None:
    """Give a finished folder its name; an older export there is moved aside first and deleted last."""
    older = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex}-older")
    if out.exists():
        os.rename(out, older)
    os.rename(temporary, out)
    fsync_directory(out.parent)
    shutil.rmtree(older, ignore_errors=True)


def _record(file: Path) -> Mapping[str, int | str]:
    """A file's size and sha256, as manifests list them, without holding it in memory."""
    with open(file, "rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def _fact(folder: Path, name: str) -> str | None:
    manifest = whole_manifest(folder)
    digest = None if manifest is None else manifest.get(name)
    return digest if isinstance(digest, str) else None


def _first_line(error: Exception) -> str:
    """The first line of a message, without anything that looks like a token."""
    lines = str(error).strip().splitlines()
    return re.sub(r"hf_\w+", "hf_...", lines[0]) if lines else "no reason given"
