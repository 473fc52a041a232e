"""Kernel distances of two sets of features, in fp64 and in the memory of one block of pairs: KID and CMMD."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from trainer.quality.rows import Divide, here
from trainer.rng import generator

Kernel = Callable[[Float64[Tensor, "a d"], Float64[Tensor, "b d"]], Float64[Tensor, "a b"]]

SUBSETS = 100
SUBSET_IMAGES = 1000
"""As published with KID; of fewer images, half of the smaller set."""
_CMMD_SIGMA = 10.0
_CMMD_SCALE = 1000.0
_BLOCK_IMAGES = 1024


def cubic_kernel(a: Float64[Tensor, "a d"], b: Float64[Tensor, "b d"]) -> Float64[Tensor, "a b"]:
    """(x.y / d + 1)^3. Source: Binkowski et al. 2018, arXiv:1801.01401, section 3.1."""
    return (a @ b.T / a.shape[1] + 1) ** 3


def gaussian_kernel(a: Float64[Tensor, "a d"], b: Float64[Tensor, "b d"]) -> Float64[Tensor, "a b"]:
    """exp(-|x - y|^2 / (2 sigma^2)) with sigma = 10. Source: Jayasumana et al. 2024, arXiv:2401.09603, section 5."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return torch.exp(-squares.clamp(min=0) / (2 * _CMMD_SIGMA**2))


def kernel_distance(
    features_a: Float[Tensor, "a d"], features_b: Float[Tensor, "b d"], *, block_images: int = _BLOCK_IMAGES, divide: Divide = here
) -> float:
    """KID over all pairs: the unbiased squared maximum mean discrepancy under the cubic kernel; may be just below 0.

    It depends on the two sets alone, while `subset_distances` depends on the choice of subsets. divide: see trainer.quality.rows.
    Raises: ValueError if a set has fewer than two images.
    Source: Gretton et al. 2012, JMLR 13, equation 3."""
    count_a, count_b = len(features_a), len(features_b)
    if min(count_a, count_b) < 2:
        raise ValueError(f"{count_a} and {count_b} images have no kernel distance; give --images 2 or more")
    within_a = _pair_sum(cubic_kernel, features_a, features_a, block_images, divide) - _self_sum(features_a)
    within_b = _pair_sum(cubic_kernel, features_b, features_b, block_images, divide) - _self_sum(features_b)
    between = _pair_sum(cubic_kernel, features_a, features_b, block_images, divide)
    return within_a / (count_a * (count_a - 1)) + within_b / (count_b * (count_b - 1)) - 2 * between / (count_a * count_b)


def subset_images(count_a: int, count_b: int) -> int:
    """How many images of each set a subset of KID has."""
    smaller = min(count_a, count_b)
    return SUBSET_IMAGES if smaller >= SUBSET_IMAGES else max(2, smaller // 2)


def chosen_subset(seed: int, number: int, *, counts: tuple[int, int], size: int) -> tuple[Tensor, Tensor]:
    """Which images of the two sets subset `number` holds, without replacement: a function of these arguments alone."""
    first, second = (torch.randperm(count, generator=generator(seed, "kid", number, side))[:size] for side, count in enumerate(counts))
    return first, second


def subset_distances(
    features_a: Float[Tensor, "a d"], features_b: Float[Tensor, "b d"], *, seed: int, subsets: int = SUBSETS, divide: Divide = here
) -> Float64[Tensor, " subsets"]:
    """The unbiased kernel distances of random subsets, whose mean and spread are published as KID.

    Raises: ValueError if a set has fewer than two images. Source: Binkowski et al. 2018, arXiv:1801.01401, section 4 and appendix D."""
    counts = (len(features_a), len(features_b))
    size = subset_images(*counts)

    def part(numbers: range) -> Float64[Tensor, " s"]:
        values = []
        for number in numbers:
            first, second = chosen_subset(seed, number, counts=counts, size=size)
            values.append(kernel_distance(features_a[first.to(features_a.device)], features_b[second.to(features_b.device)]))
        return torch.tensor(values, dtype=torch.float64)

    return divide(subsets, part)


def cmmd(
    embeddings_a: Float[Tensor, "a d"], embeddings_b: Float[Tensor, "b d"], *, block_images: int = _BLOCK_IMAGES, divide: Divide = here
) -> float:
    """1000 times the squared maximum mean discrepancy of CLIP embeddings under the Gaussian kernel; the embeddings are brought to length 1.

    The estimator is the one of least variance, with the pairs of an image and itself, so it is never below 0, as its authors' code has it.
    Raises: ValueError if a set is empty.
    Source: Jayasumana et al. 2024, arXiv:2401.09603, section 5; Gretton et al. 2012, JMLR 13, equation 5."""
    count_a, count_b = len(embeddings_a), len(embeddings_b)
    if min(count_a, count_b) < 1:
        raise ValueError(f"{count_a} and {count_b} images have no CMMD; give --images 2 or more")
    a, b = (torch.nn.functional.normalize(each.double(), dim=1) for each in (embeddings_a, embeddings_b))
    within_a, within_b, between = (_pair_sum(gaussian_kernel, x, y, block_images, divide) for x, y in ((a, a), (b, b), (a, b)))
    return _CMMD_SCALE * (within_a / count_a**2 + within_b / count_b**2 - 2 * between / (count_a * count_b))


def _pair_sum(kernel: Kernel, a: Float[Tensor, "a d"], b: Float[Tensor, "b d"], block_images: int, divide: Divide) -> float:
    """Sum of the kernel over all pairs, in the memory of one block of rows and columns."""

    def part(rows: range) -> Float64[Tensor, " r"]:
        sums = [
            torch.stack([kernel(block.double(), other.double()).sum(dim=1) for other in b.split(block_images)]).sum(dim=0)
            for block in a[rows.start : rows.stop].split(block_images)
        ]
        return torch.cat(sums)

    return float(divide(len(a), part).sum())


def _self_sum(features: Float[Tensor, "b d"]) -> float:
    """Sum of the cubic kernel of each image with itself."""
    exact = features.double()
    return float(((exact.square().sum(dim=1) / features.shape[1] + 1) ** 3).sum())
