"""Images to latents, as they are before any sampling and scaling: the moments of AutoencoderKL, or the latents of a VQModel."""

from typing import final

import torch
from diffusers import AutoencoderKL, VQModel
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from data_shards.derive.request import Precision
from data_shards.encoders.files import ModelFiles, find_model
from data_shards.encoders.precision import autocast, hold_in_bf16
from data_shards.files import read_json_object

_PARTS = ("vae", "movq")


@final
class LatentEncoder:
    """A frozen VAE."""

    def __init__(self, text: str, *, precision: Precision, device: torch.device, holds_bf16: bool = False) -> None:
        """text: as find_model takes it, at the top or in vae/; holds_bf16: see `hold_in_bf16`.

        Raises: ValueError if it is another kind of model."""
        self.files = _find(text)
        self._precision: Precision = precision
        self._device = device
        name = read_json_object(self.files.folder / "config.json").get("_class_name")
        match name:
            case "AutoencoderKL":
                self._vae: AutoencoderKL | VQModel = AutoencoderKL.from_pretrained(
                    self.files.folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
                )
            case "VQModel":
                self._vae = VQModel.from_pretrained(
                    self.files.folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32
                )
            case _:
                raise ValueError(f"{self.files.name} is of class {name}; --vae wants an AutoencoderKL or a VQModel (Kandinsky's movq)")
        if holds_bf16:
            hold_in_bf16(self._vae, precision)
        self._vae.to(device).eval()  # pyright: ignore[reportArgumentType] (diffusers hides torch's signature)

    @property
    def module(self) -> nn.Module:
        """The model itself, to be placed or shared among ranks; `encode` goes on using it."""
        return self._vae

    def encode(self, images: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """images: 0 .. 255. Of an AutoencoderKL mean and log variance, one after the other on c; not multiplied by scaling_factor."""
        return self.encode_scaled(images.to(self._device, torch.float32).mul_(2 / 255).sub_(1))

    def encode_scaled(self, pixels: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b c i j"]:
        """The same of pixels in [-1, 1] on its device, such as images whose masked part is grey."""
        # A quarter to a third less time on an AMD EPYC (128 pixels); the weights stay as FSDP wants them. What comes out is small, and
        # must not carry the format into a U-Net in the usual one: GroupNorm takes 27 times as long there (64 channels of 16 x 16 in bf16).
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast(self._device, self._precision):
            match self._vae:
                case AutoencoderKL():
                    return self._vae.encode(pixels, return_dict=False)[0].parameters.contiguous()
                case VQModel():
                    return self._vae.encode(pixels, return_dict=False)[0].contiguous()

    def to_json(self) -> dict[str, object]:
        """What a reader must know of the numbers."""
        match self._vae:
            case AutoencoderKL():
                content = "moments: mean, then log variance, on the channels; before scaling_factor and shift_factor"
            case VQModel():
                content = "latents before quantization; no variance, no scaling factor is used"
        factors = {name: self._vae.config.get(name) for name in ("scaling_factor", "shift_factor")}
        return {**self.files.to_json(), "class": type(self._vae).__name__, "content": content, **factors}


def _find(text: str) -> ModelFiles:
    try:
        return find_model(text, part=_PARTS[0])
    except ValueError as error:
        try:
            return find_model(text, part=_PARTS[1])
        except ValueError:
            raise error from None
