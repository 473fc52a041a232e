"""Makes tiny models: folders that stock diffusers and transformers load."""

import logging
import os
import tempfile
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from data_shards import ranks
from trainer.options import Options, integer, optional_text
from trainer.tiny_models.encoders import write_blip, write_clip
from trainer.tiny_models.kinds import check_kind
from trainer.tiny_models.pipelines import write_component, write_pipeline
from trainer.tiny_models.shapes import tiny_architecture
from trainer.tiny_models.vocabulary import CLIP, WORDS, clip_vocabulary_file

logger = logging.getLogger(__name__)


def make_tiny_job(path: Path, options: Options) -> int:
    """Write a tiny model into the folder `path`.

    options: kind, seed, vocabulary (default: CLIP's true one where open-clip-torch is installed, else our own words).
    Returns the exit code.
    Raises: ValueError as make_tiny."""
    kind = check_kind(optional_text(options, "kind") or "")
    vocabulary = optional_text(options, "vocabulary") or (CLIP if clip_vocabulary_file() is not None else WORDS)
    disable_progress_bar()
    if ranks.is_rank_0():
        make_tiny(kind, path, seed=integer(options, "seed", 0), vocabulary=vocabulary)
        size_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        reads = f", vocabulary {vocabulary}" if any(path.rglob("tokenizer*")) else ""
        logger.info("%s: a tiny random %s, %.1f MB%s", path, kind, size_bytes / 1e6, reads)
    return 0


def make_tiny(kind: str, folder: Path, *, seed: int = 0, vocabulary: str = WORDS) -> Path:
    """Write a small random model of this kind into an empty or new folder, and return the folder.

    The same kind, seed and vocabulary give the same bytes. vocabulary: `words`, the default, which needs no other package; `clip`, the
    true one, which open-clip-torch brings along; or the path of the true one's file.
    Raises: ValueError if there is no such kind or vocabulary, or something in the folder."""
    check_kind(kind)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new or empty folder")
    whole = folder.resolve()
    whole.parent.mkdir(parents=True, exist_ok=True)
    # written beside the folder, so that it is whole or empty
    with tempfile.TemporaryDirectory(dir=whole.parent, prefix=f".{whole.name}.") as unfinished:
        written = Path(unfinished) / "model"
        _write(kind, written, seed=seed, vocabulary=vocabulary)
        os.replace(written, whole)
    return folder


def _write(kind: str, folder: Path, *, seed: int, vocabulary: str) -> None:
    match kind:
        case "clip":
            write_clip(folder, seed=seed, vocabulary=vocabulary)
        case "blip":
            write_blip(folder, seed=seed)
        case "autoencoder":
            write_component(tiny_architecture("stable_diffusion").components["vae"], folder, seed=seed)
        case "wuerstchen_prior":
            write_pipeline(tiny_architecture("wuerstchen_decoder"), folder / "decoder", seed=seed, vocabulary=vocabulary)
            write_pipeline(tiny_architecture(kind), folder, seed=seed, vocabulary=vocabulary)
        case _:
            write_pipeline(tiny_architecture(kind), folder, seed=seed, vocabulary=vocabulary)
