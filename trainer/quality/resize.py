"""How images are brought to a feature net's size; distances depend on it, so it belongs to a net's name."""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Resize = Literal["bilinear-tf1", "bilinear", "bicubic-antialias"]
"""bilinear-tf1: as TensorFlow 1 and torch-fidelity do for Inception; bilinear: as pytorch-fid; bicubic-antialias: as Pillow, clean-fid."""


def resize_method(text: str) -> Resize:
    """Raises: ValueError if there is no such method."""
    for method in get_args(Resize):
        if text == method:
            return method
    raise ValueError(f"--resize {text} is not known; give {', '.join(get_args(Resize))}")


def resize(images: Float[Tensor, "b c h w"], pixels: int, method: Resize) -> Float[Tensor, "b c p p"]:
    """Images as squares of `pixels` a side, on the scale they came in; bicubic ones may overshoot it."""
    match method:
        case "bilinear-tf1":
            return _bilinear_tf1(images, pixels)
        case "bilinear":
            return F.interpolate(images, size=(pixels, pixels), mode="bilinear", align_corners=False)
        case "bicubic-antialias":  # with antialias torch takes Pillow's kernel, a = -0.5
            return F.interpolate(images, size=(pixels, pixels), mode="bicubic", align_corners=False, antialias=True)


def _bilinear_tf1(images: Float[Tensor, "b c h w"], pixels: int) -> Float[Tensor, "b c p p"]:
    """Output pixel i is read at i * (input size / output size): no half-pixel centres, no low-pass before a reduction.

    Source: tensorflow 1.x, core/kernels/image_resizer_state.h and resize_bilinear_op.cc, align_corners=False."""
    for dim in (3, 2):
        size = images.shape[dim]
        place = torch.arange(pixels, dtype=torch.float32, device=images.device) * (size / pixels)
        lower = place.long().clamp(max=size - 1)
        upper = (lower + 1).clamp(max=size - 1)
        share = (place - lower).unsqueeze(-1) if dim == 2 else place - lower
        low, high = images.index_select(dim, lower), images.index_select(dim, upper)
        images = low + (high - low) * share
    return images
