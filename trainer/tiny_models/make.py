"""Makes tiny models: folders that stock diffusers and transformers load."""

import json
import logging
from pathlib import Path

import diffusers
import torch
from torch import nn

from trainer.architectures import Architecture, Component
from trainer.models.from_config import build_image_processor, build_model, build_scheduler, is_model
from trainer.tiny_models.kinds import check_kind
from trainer.tiny_models.shapes import tiny_architecture
from trainer.tiny_models.vocabulary import WORDS, build_tokenizer

logger = logging.getLogger(__name__)


def make_tiny(kind: str, folder: Path, *, seed: int = 0, vocabulary: str = WORDS) -> Path:
    """Write a small random model of this kind into an empty or new folder, and return the folder.

    The same kind, seed and vocabulary give the same bytes. vocabulary: as build_tokenizer takes it; `words` needs no other package.
    Raises: ValueError if there is no such kind or vocabulary, or something in the folder."""
    check_kind(kind)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new or empty folder")
    _write_pipeline(tiny_architecture(kind), folder, seed=seed, vocabulary=vocabulary)
    return folder


def _write_pipeline(shape: Architecture, folder: Path, *, seed: int, vocabulary: str) -> None:
    """All components and, last, model_index.json."""
    tokenizers = {
        part: build_tokenizer(entry, vocabulary) for part, entry in shape.components.items() if entry.class_name == "CLIPTokenizer"
    }
    sizes = {len(tokenizer) for tokenizer in tokenizers.values()}
    for part, tokenizer in tokenizers.items():
        tokenizer.save_pretrained(folder / part)
    for part, entry in shape.components.items():
        if "vocab_size" in entry.config:
            entry = entry.with_config({"vocab_size": max(sizes)})
        _write_component(entry, folder / part, seed=seed)
    index: dict[str, object] = {"_class_name": shape.pipeline, "_diffusers_version": diffusers.__version__, **shape.settings}
    index |= {part: [entry.library, entry.class_name] for part, entry in shape.components.items()}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_component(component: Component, folder: Path, *, seed: int) -> None:
    if is_model(component):
        model = random_model(component, seed=seed)
        model.save_pretrained(folder, safe_serialization=True)  # pyright: ignore[reportCallIssue]
    elif component.class_name.endswith("Scheduler"):
        build_scheduler(component).save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
    elif component.class_name == "CLIPImageProcessor":
        build_image_processor(component).save_pretrained(folder)


def random_model(component: Component, *, seed: int) -> nn.Module:
    """The model with random weights; those that start at zero are drawn too, so that every input has an effect."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(component)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1 and not weight.any():
                    nn.init.normal_(weight, std=0.02)
    return model.eval()
