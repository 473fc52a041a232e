"""The denoising objective: levels, targets and losses of one micro-batch."""

from itertools import product

import pytest
import torch
from torch import Tensor

from trainer.config_sections import CosineClampedNoiseSchedule, DenoisingLoss, LinearNoiseSchedule, Prediction
from trainer.diffusion.parameterization import Denoiser
from trainer.diffusion.schedule import alpha_sigma, build_alpha_bar
from trainer.objectives.denoising import denoising_loss, offset

KINDS: tuple[Prediction, ...] = ("v", "eps", "x_0")
LOSSES: tuple[DenoisingLoss, ...] = ("mse", "x_mse", "eps_mse", "v_mse", "min_snr", "snr_trunc")
ALPHA_BAR = build_alpha_bar(CosineClampedNoiseSchedule())


def draw(count: int) -> tuple[Tensor, Tensor]:
    """Clean images and noise."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, 4, 4, generator=generator) * 2 - 1, torch.randn(count, 3, 4, 4, generator=generator)


def knows(x_0: Tensor, noise: Tensor, *, prediction: Prediction) -> Denoiser:
    """A denoiser that knows the answer for these very images."""

    def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
        alpha_t, sigma_t = (scale.float().view(-1, 1, 1, 1) for scale in alpha_sigma(ALPHA_BAR[timestep.long()]))
        assert torch.allclose(x_t, alpha_t * x_0 + sigma_t * noise, atol=1e-6)
        return {"v": alpha_t * noise - sigma_t * x_0, "eps": noise, "x_0": x_0}[prediction]

    return denoise


@pytest.mark.parametrize(("prediction", "loss"), list(product(KINDS, LOSSES)))
def test_a_denoiser_that_knows_the_answer_has_no_loss_and_one_that_is_off_by_one_has_its_weight(
    prediction: Prediction, loss: DenoisingLoss
) -> None:
    x_0, noise = draw(4)
    uniforms = torch.tensor([0.0, 0.3, 0.7, 0.9999], dtype=torch.float64)
    right = knows(x_0, noise, prediction=prediction)

    def measure(denoiser: Denoiser, measured: DenoisingLoss) -> Tensor:
        return denoising_loss(denoiser, x_0, noise=noise, uniforms=uniforms, alpha_bar=ALPHA_BAR, prediction=prediction, loss=measured)

    off_by_one = measure(lambda x_t, timestep: right(x_t, timestep) + 1, loss)
    assert off_by_one.shape == (4,) and off_by_one.dtype == torch.float32
    assert bool(off_by_one.isfinite().all())
    assert bool((measure(right, loss) <= 1e-9 * off_by_one).all())
    torch.testing.assert_close(measure(lambda x_t, timestep: right(x_t, timestep) + 1, "mse"), torch.ones(4))


def test_the_levels_are_floor_of_uniform_times_the_table_and_given_as_floats() -> None:
    x_0, noise = draw(3)
    seen: list[Tensor] = []

    def denoiser(x_t: Tensor, timestep: Tensor) -> Tensor:
        seen.append(timestep)
        return x_t

    uniforms = torch.tensor([0.0, 0.0019999, 1 - 2**-53], dtype=torch.float64)
    denoising_loss(denoiser, x_0, noise=noise, uniforms=uniforms, alpha_bar=ALPHA_BAR, prediction="v", loss="mse")
    assert [timestep.tolist() for timestep in seen] == [[0.0, 1.0, 999.0]]
    assert seen[0].dtype == torch.float32


def test_the_gradient_of_the_mean_loss_agrees_with_a_finite_difference() -> None:
    x_0, noise = (images.double() for images in draw(8))
    uniforms = (torch.arange(8, dtype=torch.float64) + 0.5) / 8

    def mean_loss(gain: Tensor) -> Tensor:
        table = build_alpha_bar(LinearNoiseSchedule())
        return denoising_loss(
            lambda x_t, _: gain * x_t, x_0, noise=noise, uniforms=uniforms, alpha_bar=table, prediction="v", loss="snr_trunc"
        ).mean()

    gain = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mean_loss(gain), gain)
    difference = (mean_loss(gain.detach() + 1e-5) - mean_loss(gain.detach() - 1e-5)) / 2e-5
    torch.testing.assert_close(gradient, difference, rtol=1e-7, atol=0)


def test_offset_noise_shifts_whole_channels_and_none_leaves_the_noise_alone() -> None:
    _, noise = draw(2)
    per_channel = torch.randn(2, 3, 1, 1, generator=torch.Generator().manual_seed(1))
    shift = offset(noise, per_channel, 0.1) - noise
    torch.testing.assert_close(shift, (0.1 * per_channel).expand_as(noise), rtol=0, atol=1e-6)
    assert torch.equal(offset(noise, per_channel, 0.0), noise)
