"""Where a frozen model's files lie, brought from the Hub if need be, and the hash by which shards remember it."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

from data_shards.files import read_json_object
from data_shards.hub.access import COMMIT, checked_repository, hub_errors

logger = logging.getLogger(__name__)

WEIGHTS = ("model", "diffusion_pytorch_model")  # of transformers, of diffusers
_SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja")
# of a config.json: what libraries note down of themselves, and where it was loaded from
_VOLATILE = ("_name_or_path", "_diffusers_version", "transformers_version", "torch_dtype", "dtype", "_commit_hash")
_REMOVED = "stabilityai/stable-diffusion-2"
_HASH_BYTES = 2**20


@final
@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine. root: the folder of the whole pipeline it is part of, or its own.

    name: its Hub id or its folder's last name, with the part behind it; commit: of the Hub's repository, None for a local folder."""

    folder: Path
    root: Path
    name: str
    commit: str | None
    sha256: str

    def beside(self, *names: str) -> Path:
        """The first of these folders beside it, such as its tokenizer's; its own if there is none."""
        return next((self.root / name for name in names if (self.root / name).is_dir()), self.folder)

    def to_json(self) -> dict[str, object]:
        """As it stands in an index."""
        return {"name": self.name, "commit": self.commit, "sha256": self.sha256}


def find_model(text: str, *, part: str = "", revision: str | None = None) -> ModelFiles:
    """A model of a local folder or of the Hub (which HF_HUB_OFFLINE keeps to its cache), as safetensors alone.

    text: folder or Hub id, with @REVISION behind it if `revision` is None; part: the folder within a pipeline that is looked into
    where the model is not at the top, such as vae.
    Raises: ValueError if there is none, or none of safetensors."""
    path, commit, name = _bring(
        text, revision, [f"{folder}{weights}" for folder in ("", f"{part}/" if part else "") for weights in WEIGHTS]
    )
    folder = path if (path / "config.json").is_file() or not part else path / part
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{text}: no config.json there{f' nor in {part}/' if part else ''}; wanted a model of this kind, or a pipeline with one"
        )
    if folder != path:
        name = f"{name}/{part}"
    return ModelFiles(folder, path, name, commit, encoder_sha256(folder))


def find_pipeline(text: str, *, revision: str | None = None) -> Path:
    """The folder of a whole pipeline, of this machine or of the Hub, its weights as safetensors alone.

    text, revision: as find_model takes them. Raises: ValueError if there is none."""
    path, _, _ = _bring(text, revision, [f"*/{weights}" for weights in WEIGHTS])
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{text}: no model_index.json there; wanted the folder or Hub id of a whole pipeline")
    return path


def find_tokenizer(text: str, *, revision: str | None = None) -> tuple[Path, str]:
    """Folder and name of a tokenizer: of a local folder or of the Hub. Raises: ValueError if there is none."""
    path, _, name = _bring(text, revision, [])
    folders = [folder for folder in (path, path / "tokenizer") if (folder / "tokenizer_config.json").is_file()]
    if not folders:
        raise ValueError(f"{text}: there is no tokenizer (tokenizer_config.json); give a folder or Hub id that has one")
    return folders[0], name


def encoder_sha256(folder: Path) -> str:
    """The identity of a model: its config without what libraries note of themselves, and the bytes of its weights.

    Raises: ValueError if config or weights are missing or not safetensors."""
    config = {key: value for key, value in read_json_object(folder / "config.json").items() if key not in _VOLATILE}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode())
    for path in weight_files(folder):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """The identity of a model that is one file, such as Wuerstchen's image encoder: the bytes of the file."""
    state = path.stat()
    return _file_digest(path.resolve(), state.st_size, state.st_mtime_ns).hex()


@cache
def _file_digest(path: Path, size_bytes: int, changed_ns: int) -> bytes:
    """sha256 of a file as it is: gigabytes, of which a process asks more than once, as encoder and as part of a pipeline."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def weight_files(folder: Path) -> list[Path]:
    """The files that from_pretrained would read, in a fixed order. Raises: ValueError if there are none."""
    for name in WEIGHTS:
        if (folder / f"{name}.safetensors").is_file():
            return [folder / f"{name}.safetensors"]
        listing = folder / f"{name}.safetensors.index.json"
        if listing.is_file():
            parts = read_json_object(listing).get("weight_map")
            assert isinstance(parts, dict), f"{listing} maps weights to files"
            paths = [folder / str(part) for part in sorted(set(parts.values()))]
            missing = [path for path in paths if not path.is_file()]
            if missing:
                raise ValueError(f"{missing[0]} is missing, which {listing.name} lists; download the model again")
            return paths
    others = sorted(path.name for path in folder.glob("*.bin"))
    what = f"only {others[0]}, which could run code when it is read" if others else "no weights"
    raise ValueError(
        f"{folder} has {what}; wanted {' or '.join(f'{name}.safetensors' for name in WEIGHTS)}: "
        "give a revision that has them, or save the model again with safe_serialization=True"
    )


def _bring(text: str, revision: str | None, weights: Sequence[str]) -> tuple[Path, str | None, str]:
    """The folder on this machine, the Hub's commit, and the name."""
    path = Path(text)
    if path.is_dir():
        path = path.resolve()
        if revision is not None:
            raise ValueError(f"{text} is a local folder, which has no revision {revision}; leave --revision out")
        if not any((path / name).is_file() for name in ("config.json", "model_index.json", "tokenizer_config.json")):
            raise ValueError(f"{text}: no config.json or model_index.json there; wanted a model's folder")
        return path, None, path.name
    if text.startswith(("/", "./", "../", "~")):
        raise ValueError(f"{text}: no such folder; give a model's folder, or a Hub id such as Salesforce/blip-image-captioning-large")
    name, at, behind = text.partition("@")
    found = _download(name, revision or (behind if at else None), weights)
    return found, found.name, name


def _in_cache(name: str, commit: str, weights: Sequence[str]) -> Path | None:
    """The snapshot of a commit if this machine has it with such weights: then nobody need be asked, on however many ranks."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = Path(snapshot_download(checked_repository(name), revision=commit, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return found if any(any(found.glob(pattern)) for pattern in weights) else None


def _download(name: str, revision: str | None, weights: Sequence[str]) -> Path:
    """The Hub's snapshot of a model: small files, and these weights as safetensors."""
    from huggingface_hub import constants, snapshot_download

    wanted = [f"{stem}{tail}" for stem in weights for tail in (".safetensors", "-?????-of-?????.safetensors")]
    patterns = [*_SMALL_FILES, *wanted]
    if revision is not None and COMMIT.fullmatch(revision) and (kept := _in_cache(name, revision, wanted)):
        return kept
    logger.info("bringing %s from the Hugging Face Hub, or what is new of it", name)
    try:
        with hub_errors(name, kind="model", revision=revision):
            return Path(snapshot_download(checked_repository(name), revision=revision, allow_patterns=patterns))
    except (ValueError, ConnectionError) as error:
        if name.startswith(_REMOVED):
            copy = f"sd2-community/{name.removeprefix('stabilityai/')}"
            raise ValueError(
                f"{error}. Stability AI took it off the Hub in November 2025; take its unofficial copy {copy}, or a local folder"
            ) from None
        if constants.is_offline_mode():
            raise ValueError(str(error)) from None  # another attempt would not mend it
        if isinstance(error, ConnectionError):
            raise ConnectionError(f"{error}; there is no folder {name} here either") from None
        raise
