"""Autoencoding: learn latents from which an image comes back, close to a standard normal distribution as far as that is cheap."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from trainer.diffusion.posterior import mean_and_log_variance

Autoencoder = Callable[[Float[Tensor, "b c h w"], Float[Tensor, "b l i j"]], tuple[Float[Tensor, "b c h w"], Float[Tensor, "b two_l i j"]]]
"""(images, posterior noise) -> (reconstructions, moments of the latents)."""

Features = Callable[[Float[Tensor, "b c h w"]], Sequence[Float[Tensor, "b d i j"]]]
"""Images in [-1, 1] -> maps in which images that look alike lie close together."""


def autoencoding_loss(
    autoencoder: Autoencoder,
    images: Float[Tensor, "b c h w"],
    *,
    noise: Float[Tensor, "b l i j"],
    features: Features,
    kl_weight: float,
    feature_weight: float,
) -> Float[Tensor, " b"]:
    """L1 + kl_weight * KL + feature_weight * feature distance, one an image.

    images: in [-1, 1]; noise: standard normal, what the latents are drawn with. L1 is a mean over pixels and channels; the KL
    divergence is a sum over the latent in nats, divided by the number of pixels times channels. So the whole is the loss of
    latent diffusion over a constant, its kl_weight of 1e-6 means the same here, and weights hold for every image size.
    Source: Rombach et al. 2022, arXiv:2112.10752, section 3.1 and appendix G (KL-regularised, without the discriminator)."""
    reconstruction, moments = autoencoder(images, noise)
    reconstruction = reconstruction.to(torch.promote_types(reconstruction.dtype, torch.float32))
    loss = (reconstruction - images).abs().flatten(1).mean(1)
    loss = loss + kl_weight * kl_from_standard_normal(moments) / images[0].numel()
    if feature_weight:
        loss = loss + feature_weight * feature_distance(reconstruction, images, features)
    return loss


def kl_from_standard_normal(moments: Float[Tensor, "b two_l i j"]) -> Float[Tensor, " b"]:
    """KL(q(z|x) || N(0, 1)) in nats, summed over the elements of each latent.

    Source: Kingma & Welling 2013, arXiv:1312.6114, appendix B."""
    mean, log_variance = mean_and_log_variance(moments)
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1)


def feature_distance(reconstruction: Float[Tensor, "b c h w"], images: Float[Tensor, "b c h w"], features: Features) -> Float[Tensor, " b"]:
    """Mean absolute difference of each feature map, averaged over the maps; without gradient to the images."""
    with torch.no_grad():
        wanted = features(images)
    found = features(reconstruction)
    return torch.stack([(a - b).abs().flatten(1).mean(1) for a, b in zip(found, wanted, strict=True)]).mean(0)


def edges_at_scales(images: Float[Tensor, "b c h w"], *, scales: int = 3) -> tuple[Float[Tensor, "b d i j"], ...]:
    """Differences between neighbouring pixels, across and down, of the images and of their halves, quarters ..."""
    maps = []
    for scale in range(scales):
        if scale:
            images = F.avg_pool2d(images, 2)
        maps += [images.diff(dim=3), images.diff(dim=2)]
    return tuple(maps)
