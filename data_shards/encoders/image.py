"""Images to what a prior is told of them: Kandinsky's CLIP embedding, or Wuerstchen's semantic compressor."""

from pathlib import Path
from typing import Protocol, final

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil, CLIPVisionModelWithProjection

from data_shards.derive.request import Precision
from data_shards.encoders.efficient_net import EfficientNetEncoder, load_efficient_net
from data_shards.encoders.files import find_model
from data_shards.encoders.precision import autocast, hold_in_bf16
from data_shards.files import read_json_object

# ImageNet's, which EfficientNet was trained with
_MEAN, _SCALE = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageEncoder(Protocol):
    """A frozen image encoder."""

    @property
    def module(self) -> nn.Module:
        """The model itself, to be placed or shared among ranks; `encode` goes on using it."""
        ...

    def units(self) -> tuple[nn.Module, ...]:
        """Its layers, which a shared model gathers one after the other."""
        ...

    def encode(self, images: UInt8[Tensor, "b 3 h w"]) -> Tensor:
        """images: 0 .. 255. A row a image."""
        ...

    def to_json(self) -> dict[str, object]:
        """What a reader must know of the numbers."""
        ...


def image_encoder(text: str, *, precision: Precision, device: torch.device, holds_bf16: bool = False) -> ImageEncoder:
    """text: as find_model takes it, at the top or in image_encoder/; or the .pt file of Wuerstchen's authors.

    holds_bf16: see `hold_in_bf16`. Raises: ValueError if it is another kind of model."""
    if Path(text).is_file():
        return WuerstchenEncoder(text, precision=precision, device=device, holds_bf16=holds_bf16)
    files = find_model(text, part="image_encoder")
    config = read_json_object(files.folder / "config.json")
    if config.get("_class_name") == "EfficientNetEncoder":
        return WuerstchenEncoder(text, precision=precision, device=device, holds_bf16=holds_bf16)
    if config.get("model_type") in ("clip_vision_model", "clip"):
        return ClipImageEncoder(text, precision=precision, device=device, holds_bf16=holds_bf16)
    found = config.get("_class_name") or config.get("model_type")
    raise ValueError(
        f"{files.name} is of type {found}; --image-encoder wants CLIP's image encoder with its projection (Kandinsky), or Wuerstchen's "
        "EfficientNet: the file of `hf download dome272/wuerstchen model_v2_stage_b.pt`"
    )


@final
class ClipImageEncoder:
    """CLIPVisionModelWithProjection, whose image_embeds Kandinsky's prior learns and its decoder is told."""

    def __init__(self, text: str, *, precision: Precision, device: torch.device, holds_bf16: bool = False) -> None:
        """text: as image_encoder."""
        self._files = find_model(text, part="image_encoder")
        self._precision: Precision = precision
        self._device = device
        self._model = CLIPVisionModelWithProjection.from_pretrained(
            self._files.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32
        )
        if holds_bf16:
            hold_in_bf16(self._model, precision)
        self._model.to(device).eval()  # pyright: ignore[reportArgumentType] (transformers hides torch's signature)
        folder = self._files.beside("image_processor", "feature_extractor")
        # Pillow's, also where torchvision is installed: the numbers do not depend on what else a machine has.
        self._processor = CLIPImageProcessorPil.from_pretrained(folder, local_files_only=True)

    @property
    def module(self) -> nn.Module:
        """The model itself, to be placed or shared among ranks; `encode` goes on using it."""
        return self._model

    def units(self) -> tuple[nn.Module, ...]:
        """Its layers, which a shared model gathers one after the other."""
        return tuple(self._model.vision_model.encoder.layers)

    def encode(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """images: 0 .. 255."""
        # Pillow works on the CPU; a processor of tensors would scale to other numbers.
        rows = images.cpu().permute(0, 2, 3, 1).numpy()
        pixels = self._processor(list(rows), return_tensors="pt")["pixel_values"]
        with torch.no_grad(), autocast(self._device, self._precision):
            return self._model(pixel_values=pixels.to(self._device)).image_embeds

    def to_json(self) -> dict[str, object]:
        """What a reader must know of the numbers."""
        return {**self._files.to_json(), "class": "CLIPVisionModelWithProjection", "content": "image_embeds, not standardised"}


@final
class WuerstchenEncoder:
    """EfficientNetV2-S and a projection, the latents that Wuerstchen's prior learns."""

    def __init__(self, text: str, *, precision: Precision, device: torch.device, holds_bf16: bool = False) -> None:
        """text: as image_encoder."""
        self._model, self._source = load_efficient_net(text)
        if holds_bf16:
            hold_in_bf16(self._model, precision)
        self._model.to(device)
        self._precision: Precision = precision
        self._device = device
        self._mean, self._scale = torch.tensor((_MEAN, _SCALE), device=device)[:, :, None, None]

    @property
    def module(self) -> nn.Module:
        """The model itself, to be placed or shared among ranks; `encode` goes on using it."""
        return self._model

    def units(self) -> tuple[nn.Module, ...]:
        """Its stages, which a shared model gathers one after the other."""
        return tuple(self._model.backbone)

    def encode(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 16 i j"]:
        """images: 0 .. 255; 1/32 of their size."""
        pixels = (images.to(self._device, torch.float32) / 255 - self._mean) / self._scale
        with torch.no_grad(), autocast(self._device, self._precision):
            return self._model(pixels)

    def to_json(self) -> dict[str, object]:
        """What a reader must know of the numbers."""
        content = "EfficientNet's latents; the prior's scale is (x + 1) / 42"
        return {**self._source, "class": EfficientNetEncoder.__name__, "content": content}
