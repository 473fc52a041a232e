"""Per-image losses against the documented formulas of the public scripts, written out here from scalars in fp64."""

import math
from itertools import product

import pytest
import torch
from torch import Tensor

from trainer.config_sections import DenoisingLoss, LinearNoiseSchedule, Prediction, ScaledLinearNoiseSchedule
from trainer.diffusion.schedule import build_alpha_bar, zero_terminal_snr
from trainer.objectives.denoising import denoising_loss, offset
from trainer.objectives.inpainting import mask_weight

KINDS: tuple[Prediction, ...] = ("v", "eps", "x_0")
LOSSES: tuple[DenoisingLoss, ...] = ("mse", "x_mse", "eps_mse", "v_mse", "min_snr", "snr_trunc")
LATENT = build_alpha_bar(ScaledLinearNoiseSchedule())
TABLES = {"latent": LATENT, "linear": build_alpha_bar(LinearNoiseSchedule()), "zero_terminal": zero_terminal_snr(LATENT)}
SHAPES = {"latents": (6, 4, 5, 3), "embeddings": (6, 24)}
# Timesteps of a batch, the first and the last among them.
TIMESTEPS = (0, 31, 400, 777, 998, 999)
UNIFORMS = torch.tensor([(timestep + 0.5) / 1000 for timestep in TIMESTEPS], dtype=torch.float64)


def drawn(shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Clean samples, noise, and noise for the input."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def network(x_t: Tensor, timestep: Tensor) -> Tensor:
    """Something that depends on the input and on the time."""
    return torch.tanh(0.7 * x_t) + 0.001 * timestep.view(-1, *[1] * (x_t.ndim - 1))


def documented_weight(snr: float, prediction: Prediction, loss: DenoisingLoss, gamma: float) -> float:
    """min-SNR's weight; where SNR is 0 the eps form is 0/0, and its limit for SNR -> 0 is 1."""
    if loss == "mse":
        return 1.0
    match prediction:
        case "eps":
            return min(snr, gamma) / snr if snr else 1.0
        case "v":
            return min(snr, gamma) / (snr + 1)
        case "x_0":
            return min(snr, gamma)


def documented_losses(
    x_0: Tensor,
    noise: Tensor,
    *,
    alpha_bar: Tensor,
    prediction: Prediction,
    loss: DenoisingLoss,
    gamma: float,
    input_noise: Tensor | None = None,
    weight_map: Tensor | None = None,
) -> list[float]:
    """One image after the other, in fp64 but for the network, which sees fp32."""
    losses = []
    for row, timestep in enumerate(TIMESTEPS):
        bar = alpha_bar[timestep].item()
        clean, eps = x_0[row].double(), noise[row].double()
        noised = eps if input_noise is None else input_noise[row].double()
        x_t = math.sqrt(bar) * clean + math.sqrt(1 - bar) * noised
        guess = network(x_t.float()[None], torch.tensor([float(timestep)]))[0].double()
        target = {"eps": eps, "v": math.sqrt(bar) * eps - math.sqrt(1 - bar) * clean, "x_0": clean}[prediction]
        error = (guess - target) ** 2
        if weight_map is not None:
            error = error * weight_map[row].double()
        losses.append(documented_weight(bar / (1 - bar), prediction, loss, gamma) * error.mean().item())
    return losses


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize(("prediction", "loss"), list(product(KINDS, ("mse", "min_snr"))))
def test_losses_equal_the_documented_formulas(prediction: Prediction, loss: DenoisingLoss, table: str, shape: tuple[int, ...]) -> None:
    x_0, noise, _ = drawn(shape)
    found = denoising_loss(
        network, x_0, noise=noise, uniforms=UNIFORMS, alpha_bar=TABLES[table], prediction=prediction, loss=loss, min_snr_gamma=5.0
    )
    wanted = documented_losses(x_0, noise, alpha_bar=TABLES[table], prediction=prediction, loss=loss, gamma=5.0)
    assert found.shape == (6,) and found.dtype == torch.float32
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("prediction", KINDS)
def test_offset_noise_is_in_input_and_target_and_input_perturbation_in_the_input_alone(prediction: Prediction) -> None:
    x_0, noise, extra = drawn(SHAPES["latents"])
    per_channel = torch.randn(6, 4, 1, 1, generator=torch.Generator().manual_seed(1))
    found = denoising_loss(
        network,
        x_0,
        noise=offset(noise, per_channel, 0.1),
        uniforms=UNIFORMS,
        alpha_bar=LATENT,
        prediction=prediction,
        loss="min_snr",
        input_perturbation=0.2 * extra,
    )
    with_offset = noise.double() + 0.1 * per_channel.double()
    wanted = documented_losses(
        x_0, with_offset, alpha_bar=LATENT, prediction=prediction, loss="min_snr", gamma=5.0, input_noise=with_offset + 0.2 * extra.double()
    )
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


def test_a_weight_map_is_in_the_mean_of_each_image() -> None:
    x_0, noise, _ = drawn(SHAPES["latents"])
    mask = (torch.rand(6, 1, 5, 3, generator=torch.Generator().manual_seed(2)) < 0.4).float()
    weight = mask_weight(mask, inside=3.0, outside=1.0)
    found = denoising_loss(
        network, x_0, noise=noise, uniforms=UNIFORMS, alpha_bar=LATENT, prediction="eps", loss="min_snr", weight_map=weight
    )
    wanted = documented_losses(x_0, noise, alpha_bar=LATENT, prediction="eps", loss="min_snr", gamma=5.0, weight_map=weight)
    assert found.tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("prediction", "loss"), list(product(KINDS, LOSSES)))
def test_losses_and_gradients_are_finite_at_zero_terminal_snr(prediction: Prediction, loss: DenoisingLoss) -> None:
    x_0, noise, _ = drawn(SHAPES["latents"])
    gain = torch.ones((), requires_grad=True)
    found = denoising_loss(
        lambda x_t, timestep: gain * network(x_t, timestep),
        x_0,
        noise=noise,
        uniforms=UNIFORMS,
        alpha_bar=TABLES["zero_terminal"],
        prediction=prediction,
        loss=loss,
    )
    (gradient,) = torch.autograd.grad(found.sum(), gain)
    assert bool(found.isfinite().all()) and bool(gradient.isfinite())
