"""How far two sets of images are apart, by their features: the Frechet distance and the kernel distance, in fp64."""

import torch
from jaxtyping import Float, Float64
from torch import Tensor


def mean_and_covariance(features: Float[Tensor, "b d"]) -> tuple[Float64[Tensor, " d"], Float64[Tensor, "d d"]]:
    """Mean and unbiased covariance of feature vectors.

    Raises: ValueError if there are fewer than two images."""
    if len(features) < 2:
        raise ValueError(f"{len(features)} image has no covariance; give --images 2 or more")
    exact = features.double()
    return exact.mean(dim=0), torch.cov(exact.T).reshape(features.shape[1], features.shape[1])


def frechet_distance(
    mean_a: Float64[Tensor, " d"],
    covariance_a: Float64[Tensor, "d d"],
    mean_b: Float64[Tensor, " d"],
    covariance_b: Float64[Tensor, "d d"],
) -> float:
    """Squared Wasserstein-2 distance of two Gaussians, in squared units of the features; singular covariances are allowed.

    tr (A B)^(1/2) is taken as the trace of (A^(1/2) B A^(1/2))^(1/2), which is symmetric: no complex root, no scipy.
    Source: Heusel et al. 2017, arXiv:1706.08500, equation 6."""
    eigenvalues, eigenvectors = torch.linalg.eigh(covariance_a)
    root_a = (eigenvectors * eigenvalues.clamp(min=0).sqrt()) @ eigenvectors.T
    product = root_a @ covariance_b @ root_a
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + covariance_a.trace() + covariance_b.trace() - 2 * cross
    return max(0.0, float(distance))


def kernel_distance(features_a: Float[Tensor, "a d"], features_b: Float[Tensor, "b d"], *, block_images: int = 1024) -> float:
    """KID: the unbiased squared maximum mean discrepancy under the kernel (x.y / d + 1)^3; may be just below 0.

    All pairs are taken, not random subsets, so that the result depends on the two sets alone; `block_images` bounds the memory.
    Raises: ValueError if a set has fewer than two images.
    Source: Binkowski et al. 2018, arXiv:1801.01401, section 4; Gretton et al. 2012, JMLR 13, equation 3."""
    count_a, count_b = len(features_a), len(features_b)
    if min(count_a, count_b) < 2:
        raise ValueError(f"{count_a} and {count_b} images have no kernel distance; give --images 2 or more")
    a, b = features_a.double(), features_b.double()
    within_a = _kernel_sum(a, a, block_images) - _kernel(a, a, paired=True).sum()
    within_b = _kernel_sum(b, b, block_images) - _kernel(b, b, paired=True).sum()
    between = _kernel_sum(a, b, block_images)
    return float(within_a / (count_a * (count_a - 1)) + within_b / (count_b * (count_b - 1)) - 2 * between / (count_a * count_b))


def _kernel(a: Float64[Tensor, "a d"], b: Float64[Tensor, "b d"], *, paired: bool = False) -> Float64[Tensor, "..."]:
    """Kernel values of all pairs, or of row i of `a` with row i of `b`."""
    products = (a * b).sum(dim=1) if paired else a @ b.T
    return (products / a.shape[1] + 1) ** 3


def _kernel_sum(a: Float64[Tensor, "a d"], b: Float64[Tensor, "b d"], block_images: int) -> Float64[Tensor, ""]:
    """Sum over all pairs, in the memory of one block of rows."""
    return torch.stack([_kernel(rows, b).sum() for rows in a.split(block_images)]).sum()
