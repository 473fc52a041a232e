"""Conversions between v, eps and x_0."""

from itertools import product
from typing import cast

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Tensor

from trainer.config_sections import CosineClampedNoiseSchedule, CosineNoiseSchedule, LinearNoiseSchedule, NoiseScheduleConfig, Prediction
from trainer.diffusion.parameterization import diffuse, from_x_0, to_eps, to_v, to_x_0
from trainer.diffusion.schedule import alpha_sigma, build_alpha_bar

KINDS: tuple[Prediction, ...] = ("v", "eps", "x_0")
PAIRS = list(product(KINDS, KINDS))
CONVERSIONS = {"v": to_v, "eps": to_eps, "x_0": to_x_0}


def draw(seed: int, *, dtype: torch.dtype = torch.float64) -> tuple[dict[Prediction, Tensor], Tensor, Tensor, Tensor]:
    """Images at every level of a linear schedule: the three predictions that are right, x_t, alpha_t and sigma_t."""
    generator = torch.Generator().manual_seed(seed)
    alpha_t, sigma_t = (scale.view(-1, 1, 1, 1).to(dtype) for scale in alpha_sigma(build_alpha_bar(LinearNoiseSchedule())))
    x_0 = torch.rand(1000, 1, 2, 3, generator=generator, dtype=dtype) * 2 - 1
    eps = torch.randn(1000, 1, 2, 3, generator=generator, dtype=dtype)
    x_t = diffuse(x_0, eps, alpha_t=alpha_t, sigma_t=sigma_t)
    return {"v": alpha_t * eps - sigma_t * x_0, "eps": eps, "x_0": x_0}, x_t, alpha_t, sigma_t


@pytest.mark.parametrize(("source", "wanted"), PAIRS)
def test_every_conversion_finds_the_prediction_that_is_right(source: Prediction, wanted: Prediction) -> None:
    truth, x_t, alpha_t, sigma_t = draw(0)
    converted = CONVERSIONS[wanted](truth[source], x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=source)
    torch.testing.assert_close(converted, truth[wanted], rtol=0, atol=1e-10)


@pytest.mark.parametrize(("source", "over"), PAIRS)
def test_any_prediction_survives_a_round_trip(source: Prediction, over: Prediction) -> None:
    _, x_t, alpha_t, sigma_t = draw(1)
    anything = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    there = CONVERSIONS[over](anything, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=source)
    back = CONVERSIONS[source](there, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=over)
    torch.testing.assert_close(back, anything, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_from_x_0_inverts_to_x_0(kind: Prediction) -> None:
    truth, x_t, alpha_t, sigma_t = draw(3)
    prediction = from_x_0(truth["x_0"], x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=kind)
    torch.testing.assert_close(prediction, truth[kind], rtol=0, atol=1e-10)


def test_noising_and_v_are_those_of_diffusers() -> None:
    truth, x_t, _, _ = draw(4, dtype=torch.float32)
    scheduler, timesteps = DDPMScheduler(beta_schedule="linear"), cast(torch.IntTensor, torch.arange(1000, dtype=torch.int32))
    torch.testing.assert_close(x_t, scheduler.add_noise(truth["x_0"], truth["eps"], timesteps), rtol=0, atol=1e-5)
    torch.testing.assert_close(truth["v"], scheduler.get_velocity(truth["x_0"], truth["eps"], timesteps), rtol=0, atol=1e-5)


@pytest.mark.parametrize("schedule", [LinearNoiseSchedule(), CosineNoiseSchedule(), CosineClampedNoiseSchedule()], ids=lambda s: s.kind)
@pytest.mark.parametrize(("source", "wanted"), PAIRS)
def test_conversions_are_finite_at_both_ends_of_the_table(schedule: NoiseScheduleConfig, source: Prediction, wanted: Prediction) -> None:
    table = build_alpha_bar(schedule)[[0, -1]]
    alpha_t, sigma_t = (scale.float().view(-1, 1, 1, 1) for scale in alpha_sigma(table))
    prediction = torch.full((2, 1, 1, 1), 3.0)
    converted = CONVERSIONS[wanted](prediction, -prediction, alpha_t=alpha_t, sigma_t=sigma_t, kind=source)
    assert bool(converted.isfinite().all())


@pytest.mark.parametrize(("source", "wanted"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_a_bf16_prediction_is_converted_in_fp32(source: Prediction, wanted: Prediction) -> None:
    truth, x_t, alpha_t, sigma_t = draw(5, dtype=torch.float32)
    prediction = truth[source].bfloat16()
    converted = CONVERSIONS[wanted](prediction, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=source)
    assert converted.dtype == torch.float32
    assert torch.equal(converted, CONVERSIONS[wanted](prediction.float(), x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=source))
