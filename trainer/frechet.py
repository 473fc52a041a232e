"""How far two sets of images are apart, by mean and covariance of their features: the Frechet distance, in fp64."""

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
