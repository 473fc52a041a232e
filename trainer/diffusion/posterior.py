"""The Gaussian that a variational autoencoder's moments describe: q(z|x) of a latent for an image."""

import torch
from jaxtyping import Float
from torch import Tensor

# As AutoencoderKL clamps it: a variance of e^-30 is no noise, one of e^20 is nothing but noise.
LOG_VARIANCE_RANGE = (-30.0, 20.0)


def mean_and_log_variance(
    moments: Float[Tensor, "b two_c h w"],
) -> tuple[Float[Tensor, "b c h w"], Float[Tensor, "b c h w"]]:
    """Mean and logarithm of the variance of each latent element, in fp32 at least; one after the other on the channels."""
    mean, log_variance = moments.to(torch.promote_types(moments.dtype, torch.float32)).chunk(2, dim=1)
    return mean, log_variance.clamp(*LOG_VARIANCE_RANGE)


def sample_posterior(moments: Float[Tensor, "b two_c h w"], noise: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """A latent from q(z|x) = N(mean, variance), before any scaling factor; its gradient reaches both moments.

    noise: standard normal. Source: Kingma & Welling 2013, arXiv:1312.6114, section 2.4."""
    mean, log_variance = mean_and_log_variance(moments)
    return mean + (log_variance / 2).exp() * noise
