"""Writes pipelines that stock diffusers loads: a folder for each component, and model_index.json last."""

import json
from collections.abc import Mapping
from pathlib import Path

import diffusers
from safetensors.torch import save_file

from data_shards.encoders.efficient_net import EfficientNetEncoder
from trainer.architectures import Architecture, Component
from trainer.models.from_config import build_image_processor, build_scheduler, index_entry, is_model
from trainer.tiny_models.vocabulary import build_tokenizer, write_tokenizer
from trainer.tiny_models.weights import random_model

_TOKENIZER = "CLIPTokenizer"


def write_pipeline(shape: Architecture, folder: Path, *, seed: int, vocabulary: str) -> None:
    """All components with random weights, those beside the pipeline too. Text encoders get the vocabulary's number of tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [
        write_tokenizer(build_tokenizer(entry, vocabulary), folder / part)
        for part, entry in shape.components.items()
        if entry.class_name == _TOKENIZER
    ]
    for part, entry in {**shape.components, **shape.beside}.items():
        changes: Mapping[str, object] = {"vocab_size": sizes[0]} if "vocab_size" in entry.config else {}
        write_component(entry.with_config(changes), folder / part, seed=seed)
    index: dict[str, object] = {"_class_name": shape.pipeline, "_diffusers_version": diffusers.__version__, **shape.settings}
    index |= {part: index_entry(entry) for part, entry in shape.components.items()}
    write_json(folder / "model_index.json", index)


def write_component(component: Component, folder: Path, *, seed: int) -> None:
    """One component, but for tokenizers."""
    if component.class_name == EfficientNetEncoder.__name__:
        _write_efficient_net(component, folder, seed=seed)
    elif is_model(component):
        random_model(component, seed=seed).save_pretrained(folder)  # pyright: ignore[reportCallIssue]
    elif component.class_name.endswith("Scheduler"):
        build_scheduler(component).save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]
    elif component.class_name.startswith("CLIPImageProcessor"):
        build_image_processor(component).save_pretrained(folder)
    else:
        assert component.class_name == _TOKENIZER, f"{component.class_name} is written by nothing"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    """As libraries write their configs."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_efficient_net(component: Component, folder: Path, *, seed: int) -> None:
    """In half precision, which saves 40 MB."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = random_model(component, seed=seed).state_dict()
    halved = {name: weight.half() if weight.is_floating_point() else weight for name, weight in weights.items()}
    save_file(halved, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", {"_class_name": component.class_name})
