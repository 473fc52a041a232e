"""Another program's checkpoint turned into safetensors, or a known U-Net into a pipeline's folder; nothing in it is run."""

import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data_shards.files import fsync_directory
from data_shards.weights_file import advice, named_tensors, read_weights_file
from trainer.exit_codes import DONE
from trainer.importing.pipeline import check_new, import_pipeline
from trainer.importing.settings import FAMILIES, check_family, read_given, spelled
from trainer.options import Options, optional_text

logger = logging.getLogger(__name__)

# Averages first: they are what one samples from.
_NAMES = ("ema", "ema_state_dict", "model_ema", "params_ema", "state_dict", "model", "model_state_dict", "params", "module", "weights")


def import_job(path: Path, options: Options) -> int:
    """Write the tensors in the file `path` to where the option `out` says; returns the worker's exit code.

    options: out (a safetensors file; default: beside `path`), or with family (one of importing.settings.FAMILIES) a new folder of a
    stock pipeline; then also what importing.settings.NAMES lists.
    Raises: ValueError if the file holds more than tensors can be read from safely, is of another family, or `out` exists."""
    named, given = optional_text(options, "family"), read_given(options)
    if named is not None:
        family, folder = check_family(named), Path(optional_text(options, "out") or path.with_suffix(""))
        check_new(folder)  # before the file is read, which may be gigabytes
        tensors, taken = _read(path)
        import_pipeline(tensors, family=family, given=given, file=path, taken=taken, out=folder)
        return DONE
    for name in given:
        raise ValueError(f"{spelled(name)}: says something of a known U-Net; name its family too: --as {' | '.join(FAMILIES)}")
    out = Path(optional_text(options, "out") or path.with_suffix(".safetensors"))
    _check_out(out)
    tensors, taken = _read(path)
    _write_new(out, tensors, metadata={"format": "pt", "source": path.name, "taken": taken})
    size_mib = sum(tensor.nbytes for tensor in tensors.values()) / 2**20
    logger.info("%s: %d tensors (%.1f MiB) of %s written to %s", path, len(tensors), size_mib, taken, out)
    return DONE


def find_tensors(content: object) -> tuple[dict[str, Tensor], str]:
    """The tensors by name in what a checkpoint holds, and where they lay: at the top, or one level down under a usual name.

    Raises: ValueError saying what is there instead."""
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds {type(content).__name__}, wanted a mapping of names to tensors")
    nested = {str(key): tensors for key, value in content.items() if (tensors := named_tensors(value))}
    flat = named_tensors(content)
    if len(flat) > max(map(len, nested.values()), default=0):
        return flat, "the top level"
    known = [name for name in _NAMES if name in nested]
    if known or len(nested) == 1:
        name = known[0] if known else next(iter(nested))
        others = [repr(other) for other in nested if other != name]
        return nested[name], f"{name!r}" + (f" (not of {', '.join(others)})" if others else "")
    names = ", ".join(repr(str(key)) for key in list(content)[:8])
    raise ValueError(f"no tensors at the top, nor one level down under one of {', '.join(_NAMES)}; it has {names or 'nothing'}")


def _read(path: Path) -> tuple[dict[str, Tensor], str]:
    content = read_weights_file(path)
    try:
        return find_tensors(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}. {advice(path)}") from error


def _check_out(out: Path) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: wanted a name that ends in .safetensors")
    check_new(out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: no directory {out.parent}; make it first")


def _write_new(out: Path, tensors: Mapping[str, Tensor], *, metadata: Mapping[str, str]) -> None:
    """A whole new file, or none. Raises: ValueError if one has come meanwhile, or a tensor is of a kind that the format lacks."""
    temporary = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        # Copies: the format takes no tensors that share memory, as tied weights do.
        save_file(
            {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
            temporary,
            metadata=dict(metadata),
        )
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.link(temporary, out)  # which, unlike a rename, replaces nothing
    except FileExistsError as error:
        raise ValueError(f"--out {out}: is there already; give another name, or remove it first") from error
    except (SafetensorError, KeyError, RuntimeError) as error:
        raise ValueError(f"--out {out}: a tensor cannot be written as safetensors: {error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
    fsync_directory(out.parent)
