"""From stored pixels to the model's scale."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor

_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def encode_pixels(
    images: UInt8[Tensor, "b c h w"],
    *,
    flips: Bool[Tensor, " b"] | None,
    memory_format: Literal["contiguous", "channels_last"] = "contiguous",
) -> Float[Tensor, "b c h w"]:
    """Clean images x_0 in [-1, 1] from bytes in [0, 255]; those with a flip are mirrored left to right."""
    if flips is not None:  # of bytes, a quarter of what it would be afterwards
        images = images.where(~flips[:, None, None, None], images.flip(3))
    return images.to(torch.float32, memory_format=_FORMATS[memory_format]).mul_(2 / 255).sub_(1)
