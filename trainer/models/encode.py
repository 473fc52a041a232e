"""From stored pixels to the model's scale."""

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor


def encode_pixels(images: UInt8[Tensor, "b c h w"], *, flips: Bool[Tensor, " b"] | None) -> Float[Tensor, "b c h w"]:
    """Clean images x_0 in [-1, 1] from bytes in [0, 255]; those with a flip are mirrored left to right."""
    x_0 = images.to(torch.float32).mul_(2 / 255).sub_(1)
    return x_0 if flips is None else x_0.where(~flips[:, None, None, None], x_0.flip(3))
