"""What a network may predict -- v, eps or x_0 -- and every conversion between the three at a known x_t."""

from collections.abc import Callable
from typing import assert_never

from jaxtyping import Float
from torch import Tensor

from trainer.config_sections import Prediction

Denoiser = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"]], Float[Tensor, "b c h w"]]
"""(x_t, original timestep as a float) -> prediction."""

Scale = Float[Tensor, "b 1 1 1"] | float
"""A factor per image, or one for all. fp32 tensors lift a bf16 prediction to fp32; a float leaves its dtype."""


def diffuse(x_0: Float[Tensor, "b c h w"], eps: Float[Tensor, "b c h w"], *, alpha_t: Scale, sigma_t: Scale) -> Float[Tensor, "b c h w"]:
    """x_t: clean images on the scale [-1, 1] mixed with standard normal noise.

    Source: Ho et al. 2020, arXiv:2006.11239, equation 4."""
    return alpha_t * x_0 + sigma_t * eps


def to_x_0(
    prediction: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], *, alpha_t: Scale, sigma_t: Scale, kind: Prediction
) -> Float[Tensor, "b c h w"]:
    """The clean image that a prediction of `kind` implies, unclipped; errors in eps come out alpha_t^-1 as large.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 and appendix D."""
    match kind:
        case "v":
            return alpha_t * x_t - sigma_t * prediction
        case "eps":
            return (x_t - sigma_t * prediction) / alpha_t
        case "x_0":
            return prediction
        case _:
            assert_never(kind)


def to_eps(
    prediction: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], *, alpha_t: Scale, sigma_t: Scale, kind: Prediction
) -> Float[Tensor, "b c h w"]:
    """The noise that a prediction of `kind` implies; errors in x_0 come out alpha_t / sigma_t as large.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 and appendix D."""
    match kind:
        case "v":
            return sigma_t * x_t + alpha_t * prediction
        case "eps":
            return prediction
        case "x_0":
            return (x_t - alpha_t * prediction) / sigma_t
        case _:
            assert_never(kind)


def to_v(
    prediction: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], *, alpha_t: Scale, sigma_t: Scale, kind: Prediction
) -> Float[Tensor, "b c h w"]:
    """v = alpha_t * eps - sigma_t * x_0 of what a prediction of `kind` implies; errors in x_0 come out sigma_t^-1 as large.

    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 and appendix D."""
    match kind:
        case "v":
            return prediction
        case "eps":
            return (prediction - sigma_t * x_t) / alpha_t
        case "x_0":
            return (alpha_t * x_t - prediction) / sigma_t
        case _:
            assert_never(kind)


def from_x_0(
    x_0: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], *, alpha_t: Scale, sigma_t: Scale, kind: Prediction
) -> Float[Tensor, "b c h w"]:
    """The prediction of `kind` that implies x_0 at x_t: the inverse of `to_x_0`."""
    match kind:
        case "v":
            return to_v(x_0, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind="x_0")
        case "eps":
            return to_eps(x_0, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind="x_0")
        case "x_0":
            return x_0
        case _:
            assert_never(kind)
