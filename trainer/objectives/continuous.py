"""Denoising in continuous time: learn to predict eps at any t in [0, 1], as Wuerstchen's prior does."""

from jaxtyping import Float
from torch import Tensor

from trainer.config_sections import DenoisingLoss
from trainer.diffusion.continuous import continuous_alpha_bar
from trainer.diffusion.parameterization import Denoiser, diffuse
from trainer.diffusion.schedule import COSINE_OFFSET, alpha_sigma
from trainer.objectives.losses import loss_weight, squared_error


def continuous_denoising_loss(
    denoiser: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    *,
    noise: Float[Tensor, "b c h w"],
    uniforms: Float[Tensor, " b"],
    loss: DenoisingLoss = "mse",
    min_snr_gamma: float = 5.0,
    input_perturbation: Float[Tensor, "b c h w"] | None = None,
    scaler: float = 1.0,
    cosine_offset: float = COSINE_OFFSET,
) -> Float[Tensor, " b"]:
    """Loss of eps per image at the times t = uniforms in [0, 1], which the denoiser is told.

    x_0: on the prior's scale. noise: with any offset already in it, which the network learns, too. input_perturbation: as `denoising_loss`
    takes it. scaler, cosine_offset: as `continuous_alpha_bar` takes them. Finite at both ends of time, whatever the loss: the signal there
    is never below 1e-4.
    Source: Pernias et al. 2023, arXiv:2306.00637, section 3; loss weights as `loss_weight`."""
    t = uniforms.to(x_0)  # rounded once: the network is told the very time whose noise it sees
    levels = continuous_alpha_bar(t.double(), scaler=scaler, offset=cosine_offset)
    alpha_t, sigma_t = (scale.to(x_0).view(-1, 1, 1, 1) for scale in alpha_sigma(levels))
    x_t = diffuse(x_0, noise if input_perturbation is None else noise + input_perturbation, alpha_t=alpha_t, sigma_t=sigma_t)
    output = denoiser(x_t, t)
    weight = loss_weight(alpha_t.flatten(), sigma_t.flatten(), prediction="eps", loss=loss, min_snr_gamma=min_snr_gamma)
    return weight * squared_error(output, noise)
