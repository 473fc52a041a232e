"""How far images lie from a teacher's of the same noise, image by image: in a net's features and in pixels."""

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from trainer.quality.nets import ImageFeatures
from trainer.quality.rows import Divide, here

COMPARED_IMAGES = 256
"""Of those that are drawn, the first ones; their mean is known to a few per cent."""
_CHUNK_IMAGES = 16
_LEAST_LENGTH = 1e-10


def feature_distance(net: ImageFeatures, a: UInt8[Tensor, "b 3 h w"], b: UInt8[Tensor, "b 3 h w"]) -> Float64[Tensor, " b"]:
    """Of each pair the squared distance of unit-normalised features, averaged over places, summed over the net's layers.

    Source: Zhang et al. 2018, arXiv:1801.03924, equation 1 with every weight 1."""
    found = [torch.empty(0, dtype=torch.float64)]
    for few_a, few_b in zip(a.split(_CHUNK_IMAGES), b.split(_CHUNK_IMAGES), strict=True):
        pairs = zip(net.layers(few_a), net.layers(few_b), strict=True)
        found.append(torch.stack([(_unit(x) - _unit(y)).square().sum(dim=1).mean(dim=1) for x, y in pairs]).sum(dim=0))
    return torch.cat(found)


def mean_square(a: UInt8[Tensor, "b c h w"], b: UInt8[Tensor, "b c h w"]) -> Float64[Tensor, " b"]:
    """Of each pair the mean squared difference of pixels in 0 ... 1."""
    return ((a.double() - b.double()) / 255).square().mean(dim=(1, 2, 3))


def distances(
    net: ImageFeatures, a: UInt8[Tensor, "b 3 h w"], b: UInt8[Tensor, "b 3 h w"], *, divide: Divide = here
) -> tuple[float, float]:
    """Mean feature distance, and root of the mean square over all pairs' pixels, a share of their range."""

    def part(rows: range) -> Float64[Tensor, "r 2"]:
        mine_a, mine_b = (images[rows.start : rows.stop] for images in (a, b))
        if not len(rows):
            return torch.empty((0, 2), dtype=torch.float64)
        return torch.stack([feature_distance(net, mine_a, mine_b), mean_square(mine_a, mine_b)], dim=1)

    features, squares = divide(len(a), part).mean(dim=0)
    return float(features), float(squares.sqrt())


def _unit(layer: Float[Tensor, "b c n"]) -> Float64[Tensor, "b c n"]:
    exact = layer.double()
    return exact / exact.norm(dim=1, keepdim=True).clamp(min=_LEAST_LENGTH)
