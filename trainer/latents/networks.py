"""The networks of a base: with its weights, or by their shape alone, for a plan of a run whose weights are not here."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel

from data_shards.encoders.files import ModelFiles
from data_shards.files import read_json_object
from trainer.architectures import Component, architecture_names, read_architecture
from trainer.latents.base import find_part
from trainer.models.deprecated import PriorTransformer, WuerstchenPrior
from trainer.models.from_config import build_model


class Networks(Protocol):
    """Where the trained parts of a base come from, by their name in its pipeline."""

    def __call__(self, part: str) -> tuple[nn.Module, ModelFiles | None]:
        """The part in fp32 and its files; None of a shape alone. Raises: ValueError if the base has none."""
        ...


def networks_of(base: str, revision: str | None) -> Networks:
    """The base's own networks, with their weights."""

    def load(part: str) -> tuple[nn.Module, ModelFiles | None]:
        files = find_part(base, part, revision=revision)
        found = _class_of(read_json_object(files.folder / "config.json"))
        if found not in _LOADERS:
            raise ValueError(f"{files.name} is a {found}; wanted one of {', '.join(_LOADERS)} as a base's {part}")
        return _LOADERS[found](files.folder), files

    return load


def shapes_of(base: str) -> Networks:
    """The networks of a base as they would be built, on torch's default device, with random weights or none.

    base: a folder with the configs, or the Hub id of an architecture that halfstep knows."""

    def build(part: str) -> tuple[nn.Module, ModelFiles | None]:
        return build_model(shape_of(base, part)), None

    return build


def shape_of(base: str, part: str) -> Component:
    """Class and config of a base's part, from its folder or from what halfstep knows of well-known bases.

    Raises: ValueError naming these if it is neither."""
    for folder in (Path(base) / part, Path(base)):
        if (folder / "config.json").is_file():
            config = read_json_object(folder / "config.json")
            library = "transformers" if "model_type" in config else "diffusers"
            values = {name: value for name, value in config.items() if not name.startswith("_")}
            return Component(library, _class_of(config), values)
    known = {architecture.source: architecture for architecture in map(read_architecture, architecture_names())}
    if base not in known:
        raise ValueError(f"{base}: no such folder, and its shape is not known here; give a folder with its configs, or {', '.join(known)}")
    parts = {**known[base].beside, **known[base].components}
    if part not in parts:
        raise ValueError(f"{base}: has no {part}; it has {', '.join(parts)}")
    return parts[part]


def load_text_encoder(folder: Path) -> CLIPTextModel:
    """A pipeline's CLIP text encoder in fp32."""
    return CLIPTextModel.from_pretrained(folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)


def _class_of(config: Mapping[str, object]) -> str:
    """The class that a config.json names; of transformers' CLIP text encoders it may be the type alone."""
    name, architectures = config.get("_class_name"), config.get("architectures")
    if isinstance(name, str):
        return name
    if isinstance(architectures, list) and architectures:
        return str(architectures[0])
    return "CLIPTextModel" if config.get("model_type") == "clip_text_model" else str(config.get("model_type"))


def _diffusers(kind: type[UNet2DConditionModel] | type[WuerstchenPrior] | type[PriorTransformer]) -> Callable[[Path], nn.Module]:
    return lambda folder: kind.from_pretrained(folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)


_LOADERS: Mapping[str, Callable[[Path], nn.Module]] = {
    "UNet2DConditionModel": _diffusers(UNet2DConditionModel),
    "WuerstchenPrior": _diffusers(WuerstchenPrior),
    "PriorTransformer": _diffusers(PriorTransformer),
    "CLIPTextModel": load_text_encoder,
}
