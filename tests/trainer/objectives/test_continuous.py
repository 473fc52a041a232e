"""Denoising in continuous time: the stock scheduler's noise, and losses that stay finite at both ends."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from trainer.config_sections import DenoisingLoss
from trainer.diffusion.continuous import continuous_alpha_bar
from trainer.models.deprecated import DDPMWuerstchenScheduler
from trainer.objectives.continuous import continuous_denoising_loss
from trainer.objectives.denoising import offset

TIMES = torch.cat((torch.linspace(0, 1, 301), torch.tensor([1e-4, 0.9999])))


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Latents on the prior's scale, and noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 16, 3, 3, generator=generator) / 42, torch.randn(count, 16, 3, 3, generator=generator)


@pytest.mark.parametrize("scaler", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("cosine_offset", [0.008, 0.02])
def test_levels_and_noisy_latents_are_the_stock_schedulers(scaler: float, cosine_offset: float) -> None:
    stock = DDPMWuerstchenScheduler(scaler=scaler, s=cosine_offset)
    levels = continuous_alpha_bar(TIMES.double(), scaler=scaler, offset=cosine_offset)
    torch.testing.assert_close(levels.float(), stock._alpha_cumprod(TIMES, torch.device("cpu")), rtol=0, atol=1e-6)
    x_0, noise = draw(len(TIMES))
    seen: list[tuple[Tensor, Tensor]] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return noise + x_t

    found = continuous_denoising_loss(denoiser, x_0, noise=noise, uniforms=TIMES, scaler=scaler, cosine_offset=cosine_offset)
    wanted = stock.add_noise(x_0, noise, TIMES)
    torch.testing.assert_close(seen[0][0], wanted, rtol=0, atol=2e-5)  # in fp32 the stock loses digits of 1 - alpha_bar near t = 0
    later = TIMES > 0.1
    torch.testing.assert_close(seen[0][0][later], wanted[later], rtol=0, atol=2e-6)
    assert torch.equal(seen[0][1], TIMES)
    torch.testing.assert_close(found.mean(), functional.mse_loss(noise + wanted, noise), rtol=0, atol=1e-6)


def test_levels_are_clamped_and_fall_from_clean_to_noise() -> None:
    levels = continuous_alpha_bar(torch.linspace(0, 1, 1001, dtype=torch.float64))
    assert levels[0] == 0.9999 and levels[-1] == 1e-4
    assert bool((levels.diff() <= 0).all())


def test_the_network_is_told_the_time_whose_noise_it_sees() -> None:
    x_0, noise = draw(2)
    uniforms = torch.tensor([1 - 2**-40, 0.1], dtype=torch.float64)  # the first rounds to 1 in fp32
    told: list[Tensor] = []
    continuous_denoising_loss(lambda x_t, t: told.append(t) or x_t, x_0, noise=noise, uniforms=uniforms)
    assert told[0].dtype == torch.float32 and told[0][0] == 1


@pytest.mark.parametrize("loss", ["mse", "x_mse", "eps_mse", "v_mse", "min_snr", "snr_trunc"])
def test_losses_and_gradients_are_finite_at_both_ends_with_offset_noise(loss: DenoisingLoss) -> None:
    x_0, noise = draw(4)
    noise = offset(noise, torch.ones(4, 16, 1, 1), 0.1)
    uniforms = torch.tensor([0.0, 1e-6, 1 - 1e-6, 1.0], dtype=torch.float64)
    weight = torch.tensor(0.5, requires_grad=True)
    found = continuous_denoising_loss(lambda x_t, t: weight * x_t, x_0, noise=noise, uniforms=uniforms, loss=loss)
    found.sum().backward()
    assert bool(found.isfinite().all()) and weight.grad is not None and bool(weight.grad.isfinite())
    assert found.shape == (4,) and found.dtype == torch.float32


def test_min_snr_weighs_an_error_in_eps_by_the_smaller_of_one_and_gamma_over_snr() -> None:
    x_0, noise = draw(len(TIMES))
    found = continuous_denoising_loss(lambda x_t, t: noise + 1, x_0, noise=noise, uniforms=TIMES, loss="min_snr", min_snr_gamma=5.0)
    levels = DDPMWuerstchenScheduler()._alpha_cumprod(TIMES, torch.device("cpu")).double()
    snr = levels / (1 - levels)
    torch.testing.assert_close(found, (snr.clamp(max=5.0) / snr).float(), rtol=2e-3, atol=1e-6)


def test_input_perturbation_is_in_what_the_network_sees_and_not_in_the_target() -> None:
    x_0, noise = draw(4)
    extra = 0.1 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append(x_t)
        return noise

    times = torch.linspace(0.1, 1, 4)
    found = continuous_denoising_loss(denoiser, x_0, noise=noise, uniforms=times, input_perturbation=extra)
    stock = DDPMWuerstchenScheduler().add_noise(x_0, noise + extra, times)
    torch.testing.assert_close(seen[0], stock, rtol=0, atol=2e-6)
    assert bool((found == 0).all())
