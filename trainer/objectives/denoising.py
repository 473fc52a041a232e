"""Denoising: learn to predict v, eps or x_0 from an image, latent or embedding with noise of any level."""

from jaxtyping import Float, Float64
from torch import Tensor

from trainer.config_sections import DenoisingLoss, Prediction
from trainer.diffusion.parameterization import Denoiser, diffuse
from trainer.diffusion.schedule import alpha_sigma, draw_index
from trainer.objectives.losses import loss_weight, squared_error


def denoising_loss(
    denoiser: Denoiser,
    x_0: Float[Tensor, "b *element"],
    *,
    noise: Float[Tensor, "b *element"],
    uniforms: Float[Tensor, " b"],
    alpha_bar: Float64[Tensor, " T"],
    prediction: Prediction,
    loss: DenoisingLoss,
    min_snr_gamma: float = 5.0,
    input_perturbation: Float[Tensor, "b *element"] | None = None,
    weight_map: Float[Tensor, "b *element"] | None = None,
) -> Float[Tensor, " b"]:
    """Loss per sample at the timesteps floor(uniforms * T).

    x_0: clean images on the scale [-1, 1], latents, or embeddings [b, d]. noise: with any offset already in it. alpha_bar: fp64 table,
    on any device; its last entry may be 0. input_perturbation: noise at its strength that is added to `noise` in x_t alone, not in the
    target (Ning et al. 2023, arXiv:2301.11706, section 5). weight_map: as `squared_error` takes it.
    Source: Ho et al. 2020, arXiv:2006.11239, equation 14, for eps and mse; for the rest see `loss_weight`."""
    timestep = draw_index(uniforms.to(alpha_bar.device), len(alpha_bar))
    alpha_t, sigma_t = (scale.to(x_0).view(-1, *[1] * (x_0.ndim - 1)) for scale in alpha_sigma(alpha_bar[timestep]))
    x_t = diffuse(x_0, noise if input_perturbation is None else noise + input_perturbation, alpha_t=alpha_t, sigma_t=sigma_t)
    output = denoiser(x_t, timestep.to(x_0))
    match prediction:
        case "v":
            wanted = alpha_t * noise - sigma_t * x_0
        case "eps":
            wanted = noise
        case "x_0":
            wanted = x_0
    weight = loss_weight(alpha_t.flatten(), sigma_t.flatten(), prediction=prediction, loss=loss, min_snr_gamma=min_snr_gamma)
    return weight * squared_error(output, wanted, weight_map=weight_map)


def offset(noise: Float[Tensor, "b c h w"], per_channel: Float[Tensor, "b c 1 1"], strength: float) -> Float[Tensor, "b c h w"]:
    """Noise whose channels are shifted as a whole: images much brighter or darker than the mean become likely.

    per_channel: standard normal; strength: 0 is off, 0.1 is usual. The network learns the shift as part of eps.
    Source: Guttenberg 2023, "Diffusion with Offset Noise", crosslabs.org/blog/diffusion-with-offset-noise."""
    return noise + strength * per_channel if strength else noise
