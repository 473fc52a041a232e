"""Weights that others have saved, read where nothing in the file is run: safetensors, or torch's pickles of tensors alone."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

PICKLED = (".pt", ".pth", ".ckpt", ".bin")
_ZIP = b"PK\x03\x04"


def read_weights_file(path: Path) -> object:
    """What the file holds: of safetensors a mapping of names to tensors; of a pickle tensors and plain containers, in any arrangement.

    Raises: ValueError if it is named otherwise, is damaged, holds more than that, or is a compressed archive."""
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file: {error}") from error
    if path.suffix not in PICKLED:
        raise ValueError(f"{path}: wanted a file named {', '.join(PICKLED)} or .safetensors")
    with open(path, "rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    try:
        if zipped:
            _check_stored(path)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except OSError:
        raise
    except Exception as error:  # a hostile or damaged pickle can make its reader fail with anything
        raise ValueError(f"{path}: refused: {_why(str(error))}. {advice(path)}") from error


def named_tensors(content: object) -> dict[str, Tensor]:
    """The tensors by name that lie at the top of what a file holds."""
    if not isinstance(content, Mapping):
        return {}
    return {name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, Tensor)}


def advice(path: Path) -> str:
    """How to come by a file that can be read."""
    return (
        f"Ask for a .safetensors file; or, where you trust {path.name} and what it calls, save its tensors alone there: "
        "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
    )


def _check_stored(path: Path) -> None:
    """A compressed archive may unpack to more than the memory holds."""
    with zipfile.ZipFile(path) as archive:
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("it is a compressed archive, which torch.save does not write")


def _why(message: str) -> str:
    """torch's message without its advice to load the file unsafely."""
    if found := re.search(r"GLOBAL (\S+) was not an allowed global|Trying to load unsupported GLOBAL (\S+)", message):
        name = found[1] or found[2]
        return f"it holds more than tensors: it asks to call {name}, and that would run code that the file has chosen"
    lines = [line for line in message.splitlines() if line and not line.startswith("Weights only load failed")]
    return f"it cannot be read as tensors alone ({lines[-1] if lines else 'empty'})"
