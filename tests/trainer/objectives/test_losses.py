"""Loss weights against errors measured in each space and against published weights."""

from itertools import product
from typing import cast

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor

from trainer.config_sections import (
    CosineClampedNoiseSchedule,
    CosineNoiseSchedule,
    DenoisingLoss,
    LinearNoiseSchedule,
    NoiseScheduleConfig,
    Prediction,
    ScaledLinearNoiseSchedule,
)
from trainer.diffusion.parameterization import diffuse, to_eps, to_v, to_x_0
from trainer.diffusion.schedule import alpha_sigma, build_alpha_bar
from trainer.objectives.losses import loss_weight, squared_error

KINDS: tuple[Prediction, ...] = ("v", "eps", "x_0")
LOSSES: tuple[DenoisingLoss, ...] = ("mse", "x_mse", "eps_mse", "v_mse", "min_snr", "snr_trunc")
SCHEDULES: tuple[NoiseScheduleConfig, ...] = (
    LinearNoiseSchedule(),
    ScaledLinearNoiseSchedule(),
    CosineNoiseSchedule(),
    CosineClampedNoiseSchedule(),
)


def errors_in_every_space(prediction: Prediction) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Squared errors of one wrong prediction an image, measured after an explicit conversion into each space."""
    generator = torch.Generator().manual_seed(0)
    alpha_t, sigma_t = (scale.view(-1, 1, 1, 1) for scale in alpha_sigma(build_alpha_bar(LinearNoiseSchedule())))
    x_0, eps, guess = torch.randn(3, 1000, 1, 3, 3, generator=generator, dtype=torch.float64)
    x_t = diffuse(x_0, eps, alpha_t=alpha_t, sigma_t=sigma_t)
    errors = {
        "x_mse": squared_error(to_x_0(guess, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction), x_0),
        "eps_mse": squared_error(to_eps(guess, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction), eps),
        "v_mse": squared_error(to_v(guess, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction), alpha_t * eps - sigma_t * x_0),
    }
    errors["mse"] = errors[{"v": "v_mse", "eps": "eps_mse", "x_0": "x_mse"}[prediction]]
    return errors, alpha_t.flatten(), sigma_t.flatten()


@pytest.mark.parametrize("prediction", KINDS)
def test_errors_scale_between_the_spaces_as_the_identities_say(prediction: Prediction) -> None:
    errors, alpha_t, sigma_t = errors_in_every_space(prediction)
    snr = (alpha_t / sigma_t) ** 2
    torch.testing.assert_close(errors["v_mse"], (1 + snr) * errors["x_mse"], rtol=1e-8, atol=0)
    torch.testing.assert_close(errors["v_mse"], errors["x_mse"] / sigma_t**2, rtol=1e-8, atol=0)
    torch.testing.assert_close(errors["eps_mse"], snr * errors["x_mse"], rtol=1e-8, atol=0)
    torch.testing.assert_close(errors["v_mse"], errors["eps_mse"] / alpha_t**2, rtol=1e-8, atol=0)


@pytest.mark.parametrize(("prediction", "loss"), list(product(KINDS, LOSSES)))
def test_a_weighted_error_in_the_own_space_is_the_error_in_the_named_one(prediction: Prediction, loss: DenoisingLoss) -> None:
    errors, alpha_t, sigma_t = errors_in_every_space(prediction)
    snr = (alpha_t / sigma_t) ** 2
    wanted = errors | {
        "snr_trunc": torch.maximum(errors["x_mse"], errors["eps_mse"]),
        "min_snr": snr.clamp(max=5.0) * errors["x_mse"],
    }
    weight = loss_weight(alpha_t, sigma_t, prediction=prediction, loss=loss, min_snr_gamma=5.0)
    torch.testing.assert_close(weight * errors["mse"], wanted[loss], rtol=1e-8, atol=0)


@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_weights_are_those_of_the_training_scripts_of_diffusers(prediction: Prediction, gamma: float) -> None:
    snr = cast(Tensor, compute_snr(DDPMScheduler(beta_schedule="linear"), torch.arange(1000))).double()
    wanted = snr.clamp(max=gamma) / {"v": snr + 1, "eps": snr, "x_0": torch.ones_like(snr)}[prediction]
    alpha_t, sigma_t = alpha_sigma(build_alpha_bar(LinearNoiseSchedule()))
    weight = loss_weight(alpha_t, sigma_t, prediction=prediction, loss="min_snr", min_snr_gamma=gamma)
    # diffusers computes the ratio in fp32 from 1 - alpha_bar.
    torch.testing.assert_close(weight, wanted, rtol=2e-3, atol=0)


@pytest.mark.parametrize(("prediction", "loss"), list(product(KINDS, LOSSES)))
def test_weights_are_finite_on_every_level_and_at_zero_signal(prediction: Prediction, loss: DenoisingLoss) -> None:
    for schedule in SCHEDULES:
        table = torch.cat([build_alpha_bar(schedule), torch.zeros(1, dtype=torch.float64)])
        alpha_t, sigma_t = (scale.float() for scale in alpha_sigma(table))
        weight = loss_weight(alpha_t, sigma_t, prediction=prediction, loss=loss)
        assert bool(weight.isfinite().all()) and bool((weight >= 0).all())


def test_the_min_snr_weight_of_eps_tends_to_one_at_zero_signal() -> None:
    weight = loss_weight(torch.zeros(1), torch.ones(1), prediction="eps", loss="min_snr")
    assert weight.item() == 1


def test_a_squared_error_is_a_mean_over_pixels_and_one_an_image() -> None:
    target = torch.zeros(2, 3, 4, 4)
    prediction = torch.stack([torch.full((3, 4, 4), 2.0), torch.full((3, 4, 4), 3.0)])
    assert squared_error(prediction, target).tolist() == [4.0, 9.0]
    assert squared_error(prediction.bfloat16(), target).dtype == torch.float32
