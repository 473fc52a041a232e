"""Any unconditional UNet2DModel of diffusers, such as google/ddpm-celebahq-256: found, built by its config, loaded from safetensors."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d import UNet2DModel

from data_shards.encoders.files import ModelFiles, find_model
from data_shards.files import read_json_object
from trainer.latents.base import scheduler_config
from trainer.pixel_base import PixelBase

_PART = "unet"


def find_base(base: str, *, revision: str | None = None) -> tuple[PixelBase, ModelFiles]:
    """A folder's or a Hub id's U-Net and scheduler, and where the U-Net's files lie. Nothing of it is run or unpickled.

    base: a DDPM or DDIM pipeline, or a UNet2DModel with scheduler_config.json beside it.
    Raises: ValueError if there is none, it has no safetensors, or it is of a kind that is not known here."""
    _check_safetensors(Path(base))
    files = find_model(base, part=_PART, revision=revision)
    try:
        found = PixelBase(files.sha256, _plain(read_json_object(files.folder / "config.json")), _plain(scheduler_config(files)))
    except ValueError as error:
        raise ValueError(f"{files.name}: {error}") from error
    return found, files


def load_unet(files: ModelFiles) -> UNet2DModel:
    """The network of a base in fp32, on the CPU, names of older diffusers brought up to date."""
    loaded = UNet2DModel.from_pretrained(files.folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
    assert isinstance(loaded, UNet2DModel), "from_pretrained builds its own class"
    return loaded


def build_unet(shape: Mapping[str, object], image_size: int, *, dropout: float | None = None) -> UNet2DModel:
    """The network of a base on torch's default device, with random weights or none.

    shape: its config.json. image_size: pixels a side that it is to work on; dropout: None for the base's own.
    Raises: ValueError if its levels cannot halve the image that often, or the config does not make a network."""
    widths = shape.get("block_out_channels", (224, 448, 672, 896))
    halvings = len(widths) - 1 if isinstance(widths, list | tuple) else 0
    if image_size % 2**halvings:
        raise ValueError(
            f"image size {image_size} cannot be halved {halvings} times for the base's {halvings + 1} levels; "
            f"pack shards of a multiple of {2**halvings} pixels, such as its own {shape.get('sample_size')}"
        )
    config = {name: value for name, value in shape.items() if not name.startswith("_")}
    config |= {"sample_size": image_size} | ({} if dropout is None else {"dropout": dropout})
    try:
        built = UNet2DModel.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the base's config.json makes no UNet2DModel: {error}; give another base") from error
    assert isinstance(built, UNet2DModel), "from_config builds its own class"
    if built.mid_block is None:
        raise ValueError("the base's network has no middle block (mid_block_type), which is not known here; give another base")
    return built


def load_base(base: PixelBase, files: ModelFiles, image_size: int, *, dropout: float | None = None) -> UNet2DModel:
    """The network as build_unet makes it, with the base's weights. Raises: ValueError as build_unet."""
    with torch.device("meta"):
        model = build_unet(base.unet, image_size, dropout=dropout)
    model.load_state_dict(load_unet(files).state_dict(), assign=True)
    return model.requires_grad_(True)


def _plain(config: dict[str, object]) -> dict[str, object]:
    """A config without what libraries note of themselves, but for the class."""
    return {name: value for name, value in config.items() if not name.startswith("_") or name == "_class_name"}


def _check_safetensors(folder: Path) -> None:
    """Say how to convert a folder whose weights are a pickle alone."""
    for place in (folder / _PART, folder):
        if (place / "config.json").is_file() and not any(place.glob("*.safetensors")) and any(place.glob("*.bin")):
            convert = f"UNet2DModel.from_pretrained('{place}', use_safetensors=False).save_pretrained('{place}')"
            raise ValueError(
                f"{place}: has weights only as {min(place.glob('*.bin')).name}, a pickle, which could run code when it is read; wanted "
                f'safetensors. Where you trust it, convert it once: python -c "from diffusers import UNet2DModel; {convert}"'
            )
