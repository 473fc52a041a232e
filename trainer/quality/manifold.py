"""Nearest neighbours in feature space, a block of rows at a time, and the precision and recall of k-NN manifolds."""

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.quality.rows import Divide, here

NEIGHBOURS = 3
"""Of an image, that its part of a manifold reaches to; k of the paper, section 2."""
_BLOCK_ROWS = 256
_BLOCK_POINTS = 4096
_ROUNDING = 2.0**-44
"""Of fp64 sums of some thousand squares: a difference that is smaller than this share of them is none."""


def squared_distances(rows: Float[Tensor, "r d"], points: Float[Tensor, "p d"]) -> Float64[Tensor, "r p"]:
    """|x - y|^2 of all pairs in fp64; exactly 0 where rounding cannot tell x from y."""
    exact = rows.double()
    lengths = exact.square().sum(dim=1)[:, None]
    blocks = []
    for block in points.split(_BLOCK_POINTS):
        others = block.double()
        both = lengths + others.square().sum(dim=1)
        squares = both - 2 * exact @ others.T
        blocks.append(torch.where(squares <= _ROUNDING * both, 0.0, squares))
    return torch.cat(blocks, dim=1)


def nearest(
    queries: Float[Tensor, "q d"], points: Float[Tensor, "p d"], *, count: int, divide: Divide = here
) -> tuple[Float64[Tensor, "q n"], Int64[Tensor, "q n"]]:
    """Distances and numbers of the `count` points nearest to each query, the nearest first; of all points where there are fewer.

    Raises: ValueError if there is no point."""
    if not len(points):
        raise ValueError("there are no images to look for neighbours in; give shards that hold some")
    count = min(count, len(points))

    def part(rows: range) -> Float64[Tensor, "r 2 n"]:
        found = [torch.empty((0, 2, count), dtype=torch.float64, device=queries.device)]
        for block in queries[rows.start : rows.stop].split(_BLOCK_ROWS):
            values, numbers = squared_distances(block, points).topk(count, dim=1, largest=False)
            found.append(torch.stack([values.sqrt(), numbers.double()], dim=1))
        return torch.cat(found)

    both = divide(len(queries), part)
    return both[:, 0], both[:, 1].long()


def squared_radii(features: Float[Tensor, "b d"], *, neighbours: int = NEIGHBOURS, divide: Divide = here) -> Float64[Tensor, " b"]:
    """Squared distance of each image to its k-th nearest other image.

    Raises: ValueError if there are not more than k images. Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, equation 1."""
    if len(features) <= neighbours:
        raise ValueError(f"{len(features)} images have no manifold of {neighbours} neighbours; give --images {neighbours + 1} or more")

    def part(rows: range) -> Float64[Tensor, " r"]:
        found = [torch.empty(0, dtype=torch.float64, device=features.device)]
        for first in range(rows.start, rows.stop, _BLOCK_ROWS):
            numbers = torch.arange(first, min(first + _BLOCK_ROWS, rows.stop), device=features.device)
            squares = squared_distances(features[numbers], features)
            squares[torch.arange(len(numbers), device=features.device), numbers] = torch.inf  # no image is its own neighbour
            found.append(squares.topk(neighbours, dim=1, largest=False).values[:, -1])
        return torch.cat(found)

    return divide(len(features), part)


def share_within(
    queries: Float[Tensor, "q d"], points: Float[Tensor, "p d"], radii: Float64[Tensor, " p"], *, divide: Divide = here
) -> float:
    """Share of queries that lie in the ball around at least one point; radii: squared, as squared_radii gives them.

    Of drawn images in the reference's balls it is precision, of reference images in the drawn ones' it is recall.
    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991, equations 1 and 2."""

    def part(rows: range) -> Float64[Tensor, " r"]:
        found = [torch.empty(0, dtype=torch.float64, device=queries.device)]
        for block in queries[rows.start : rows.stop].split(_BLOCK_ROWS):
            found.append((squared_distances(block, points) <= radii).any(dim=1).double())
        return torch.cat(found)

    return float(divide(len(queries), part).mean())
