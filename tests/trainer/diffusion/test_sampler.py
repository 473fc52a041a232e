"""Samplers against diffusers' schedulers, with the same generators."""

from collections.abc import Sequence
from typing import Literal, cast

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from torch import Generator, Tensor

from trainer.config_sections import CosineClampedNoiseSchedule, LinearNoiseSchedule, Prediction
from trainer.diffusion.sampler import Variance, ancestral_step, ddim_step, draw_noise, posterior_variance, sample, sampling_grid
from trainer.diffusion.schedule import build_alpha_bar, respaced_betas
from trainer.stages import grid

PREDICTION_TYPES: dict[Prediction, Literal["v_prediction", "epsilon", "sample"]] = {"v": "v_prediction", "eps": "epsilon", "x_0": "sample"}
LINEAR = build_alpha_bar(LinearNoiseSchedule())
SHAPE = (3, 4, 4)
# diffusers keeps alpha_bar in fp32, which shifts a pixel by up to 4e-4. Given the fp64 table it computes what we compute.
STOCK_ATOL, EXACT_ATOL = 1e-3, 1e-6


def denoiser(x_t: Tensor, timestep: Tensor) -> Tensor:
    """A smooth stand-in for a network, which mixes channels and depends on the time."""
    return torch.tanh(x_t.roll(1, dims=1) * (0.2 + timestep.view(-1, 1, 1, 1) / 1000)) + 0.3 * x_t


def sample_with_stock(
    scheduler: DDIMScheduler | DDPMScheduler, timesteps: Sequence[int], x_T: Tensor, generators: list[Generator], *, eta: float = 0.0
) -> Tensor:
    """diffusers' pipeline loop over a re-indexed scheduler: index k stands for the k-th of the ascending original timesteps."""
    scheduler.set_timesteps(len(timesteps))
    x_t = x_T
    each = cast(Generator, generators)  # diffusers takes a list of them, though its annotation does not say so
    for index in scheduler.timesteps.tolist():
        output = denoiser(x_t, torch.full((len(x_t),), float(timesteps[index])))
        match scheduler:
            case DDIMScheduler():
                x_t = scheduler.step(output, index, x_t, eta=eta, generator=each, return_dict=False)[0]
            case DDPMScheduler():
                x_t = scheduler.step(output, index, x_t, generator=each, return_dict=False)[0]
    return x_t


@pytest.mark.parametrize("table", [LINEAR, build_alpha_bar(CosineClampedNoiseSchedule())], ids=["linear", "cosine_clamped"])
@pytest.mark.parametrize(("count", "eta"), [(500, 0.0), (63, 0.0), (63, 0.5), (50, 1.0), (8, 0.0), (8, 1.0), (1, 0.0), (1, 1.0)])
@pytest.mark.parametrize("prediction", ["v", "eps", "x_0"])
def test_ddim_equals_the_scheduler_of_diffusers(table: Tensor, count: int, eta: float, prediction: Prediction) -> None:
    timesteps = grid(1000, count)
    scheduler = DDIMScheduler(
        num_train_timesteps=count,
        trained_betas=respaced_betas(table, timesteps),
        timestep_spacing="trailing",
        prediction_type=PREDICTION_TYPES[prediction],
        clip_sample=True,
        set_alpha_to_one=True,
    )
    x_T, generators = draw_noise(7, 2, SHAPE)
    ours = sample(denoiser, x_T, sampling_grid(table, timesteps), prediction=prediction, sampler="ddim", eta=eta, generators=generators)
    x_T, generators = draw_noise(7, 2, SHAPE)
    torch.testing.assert_close(ours, sample_with_stock(scheduler, timesteps, x_T, generators, eta=eta), rtol=0, atol=STOCK_ATOL)
    scheduler.alphas_cumprod = table[list(timesteps)]
    x_T, generators = draw_noise(7, 2, SHAPE)
    torch.testing.assert_close(ours, sample_with_stock(scheduler, timesteps, x_T, generators, eta=eta), rtol=0, atol=EXACT_ATOL)


@pytest.mark.parametrize("table", [LINEAR, build_alpha_bar(CosineClampedNoiseSchedule())], ids=["linear", "cosine_clamped"])
@pytest.mark.parametrize("count", [500, 63, 8, 1])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("prediction", ["v", "eps", "x_0"])
def test_ancestral_sampling_equals_the_scheduler_of_diffusers(
    table: Tensor, count: int, variance: Variance, prediction: Prediction
) -> None:
    timesteps = grid(1000, count)
    scheduler = DDPMScheduler(
        num_train_timesteps=count,
        trained_betas=respaced_betas(table, timesteps),
        timestep_spacing="trailing",
        prediction_type=PREDICTION_TYPES[prediction],
        variance_type=variance,
        clip_sample=True,
    )
    levels = sampling_grid(table, timesteps)
    x_T, generators = draw_noise(11, 2, SHAPE)
    ours = sample(denoiser, x_T, levels, prediction=prediction, sampler="ancestral", variance=variance, generators=generators)
    x_T, generators = draw_noise(11, 2, SHAPE)
    torch.testing.assert_close(ours, sample_with_stock(scheduler, timesteps, x_T, generators), rtol=0, atol=STOCK_ATOL)
    scheduler.alphas_cumprod = table[list(timesteps)]
    x_T, generators = draw_noise(11, 2, SHAPE)
    torch.testing.assert_close(ours, sample_with_stock(scheduler, timesteps, x_T, generators), rtol=0, atol=EXACT_ATOL)


@pytest.mark.parametrize("count", [1000, 500, 250, 125, 50])
def test_a_teacher_at_a_trailing_grid_equals_ddim_over_the_full_schedule(count: int) -> None:
    scheduler = DDIMScheduler(beta_schedule="linear", timestep_spacing="trailing", prediction_type="v_prediction")
    x_T, _ = draw_noise(3, 2, SHAPE)
    stock = sample_with_stock_times(scheduler, count, x_T)
    ours = sample(denoiser, x_T, sampling_grid(LINEAR, grid(1000, count)), prediction="v", sampler="ddim")
    torch.testing.assert_close(ours, stock, rtol=0, atol=STOCK_ATOL)


def sample_with_stock_times(scheduler: DDIMScheduler, count: int, x_T: Tensor) -> Tensor:
    """diffusers' pipeline loop over a scheduler with all the original timesteps."""
    scheduler.set_timesteps(count)
    x_t = x_T
    for timestep in scheduler.timesteps.tolist():
        x_t = scheduler.step(denoiser(x_t, torch.full((len(x_t),), float(timestep))), timestep, x_t, return_dict=False)[0]
    return x_t


def test_only_x_0_is_clipped_and_the_direction_is_not() -> None:
    x_T = torch.full((1, 1, 1, 1), 2.0)
    grid_of_two = sampling_grid(torch.tensor([0.64, 0.36], dtype=torch.float64), (0, 1))

    def constant_eps(x_t: Tensor, timestep: Tensor) -> Tensor:
        return torch.zeros_like(x_t)

    # x_0 = 2 / 0.6 is clipped to 1, eps stays 0: x = 0.8 at the second level, whose x_0 = 0.8 / 0.8.
    assert sample(constant_eps, x_T, grid_of_two, prediction="eps", sampler="ddim").item() == pytest.approx(1.0)
    free = sample(constant_eps, x_T, grid_of_two, prediction="eps", sampler="ddim", clip=False).item()
    assert free == pytest.approx(2 / 0.6)


@pytest.mark.parametrize("level", [1e-9, 0.3, 0.9999])
def test_a_step_with_eta_1_and_an_ancestral_step_are_one_draw(level: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, x_t, noise = torch.randn(3, 2, 1, 2, 2, generator=generator, dtype=torch.float64)
    cleaner = (1 + level) / 2
    eps = (x_t - level**0.5 * x_0) / (1 - level) ** 0.5
    scale = posterior_variance(level, cleaner) ** 0.5
    ddim = ddim_step(x_0, eps, alpha_s=cleaner**0.5, sigma_s=(1 - cleaner) ** 0.5, noise=noise, noise_scale=scale)
    ancestral = ancestral_step(x_0, x_t, alpha_bar_t=level, alpha_bar_s=cleaner, variance="fixed_small", noise=noise)
    torch.testing.assert_close(ddim, ancestral, rtol=0, atol=1e-10)


def test_image_i_is_the_same_whichever_images_are_drawn_with_it() -> None:
    levels = sampling_grid(LINEAR, grid(1000, 8))

    def images(count: int, start: int) -> Tensor:
        x_T, generators = draw_noise(5, count, SHAPE, start=start)
        return sample(denoiser, x_T, levels, prediction="v", sampler="ancestral", generators=generators)

    assert torch.equal(images(4, 0)[2:], images(2, 2))
    assert torch.equal(draw_noise(5, 1, SHAPE)[0], torch.randn((1, *SHAPE), generator=Generator().manual_seed(5)))


def test_sampling_reports_every_step_and_leaves_its_input_and_an_ordinary_tensor() -> None:
    done: list[int] = []
    x_T, _ = draw_noise(0, 1, SHAPE)
    before = x_T.clone()
    images = sample(denoiser, x_T, sampling_grid(LINEAR, grid(1000, 4)), prediction="v", sampler="ddim", on_step=done.append)
    assert done == [1, 2, 3, 4]
    assert torch.equal(x_T, before)
    assert not images.is_inference() and images.abs().max().item() <= 1


def test_noise_without_a_generator_an_image_is_refused() -> None:
    x_T, generators = draw_noise(0, 2, SHAPE)
    levels = sampling_grid(LINEAR, grid(1000, 4))
    with pytest.raises(ValueError, match="wanted 2 generators, got none"):
        sample(denoiser, x_T, levels, prediction="v", sampler="ancestral")
    with pytest.raises(ValueError, match="wanted 2 generators, got 1"):
        sample(denoiser, x_T, levels, prediction="v", sampler="ddim", eta=1.0, generators=generators[:1])


@pytest.mark.parametrize("timesteps", [(), (1, 1), (1000,), (-1, 5)])
def test_a_grid_outside_the_table_is_refused(timesteps: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="wanted different ones from 0 to 999"):
        sampling_grid(LINEAR, timesteps)


def test_a_grid_is_descending_whatever_the_order_given() -> None:
    assert sampling_grid(LINEAR, (3, 999, 500)) == sampling_grid(LINEAR, (999, 500, 3))
    assert sampling_grid(LINEAR, (3, 999, 500)).timesteps == (999, 500, 3)
