"""Squared errors per image, and the weights that turn one prediction space's into another's."""

from typing import assert_never

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.config_sections import DenoisingLoss, Prediction

# Below this alpha^2 an error in x_0 is no longer told from one in eps: eps weights stay finite at zero signal.
SMALLEST_SIGNAL = 1e-12


def squared_error(
    prediction: Float[Tensor, "b *element"], target: Float[Tensor, "b *element"], *, weight_map: Float[Tensor, "b *element"] | None = None
) -> Float[Tensor, " b"]:
    """Mean squared error over all elements of an image or embedding, one a sample, in fp32 at least.

    weight_map: factors of the elements, e.g. [b, 1, h, w] for all channels alike; a mean of 1 keeps the scale. None: all are 1."""
    error = (prediction - target).square()
    return (error if weight_map is None else error * weight_map).flatten(1).mean(1)


def loss_weight(
    alpha_t: Float[Tensor, " b"], sigma_t: Float[Tensor, " b"], *, prediction: Prediction, loss: DenoisingLoss, min_snr_gamma: float = 5.0
) -> Float[Tensor, " b"]:
    """What the squared error in the prediction's own space is multiplied by to become `loss`.

    At one x_t, MSE_v = (1 + SNR) MSE_x = MSE_eps / alpha_t^2, so any loss is a weighted error of what the network puts out; no
    prediction is converted, and none is divided by a small scale. Finite for alpha_t = 0, too: min_snr's weight is then 1 for eps.
    Source: Salimans & Ho 2022, arXiv:2202.00512, section 4 (v_mse is its "SNR+1", snr_trunc its "truncated SNR" weighting);
    Hang et al. 2023, arXiv:2303.09556, section 3.4 (min_snr)."""
    if loss == "mse":
        return torch.ones_like(alpha_t)
    signal, power = alpha_t.square().clamp(min=SMALLEST_SIGNAL), sigma_t.square()
    match loss:
        case "x_mse":
            of_v = power
        case "eps_mse":
            of_v = signal
        case "v_mse":
            of_v = torch.ones_like(signal)
        case "snr_trunc":
            of_v = torch.maximum(power, signal)
        case "min_snr":
            of_v = torch.minimum(signal, min_snr_gamma * power)
        case _:
            assert_never(loss)
    match prediction:
        case "v":
            return of_v
        case "eps":
            return of_v / signal
        case "x_0":
            return of_v / power
        case _:
            assert_never(prediction)
