"""Chains of halvings on normal data, where every stage can be fitted exactly: which target belongs to which sampler.

Data are normal with a given standard deviation and mean 0, so every exact network is x_0 = c_t x_t with one number a level. A
student's numbers are the exact regression of the halving target on x_t; the standard deviation of its samples tells what it
has learnt. The printed numbers were measured once by an independent program."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from trainer.config_sections import CosineNoiseSchedule, LinearNoiseSchedule, NoiseScheduleConfig, Sampler
from trainer.diffusion.parameterization import Denoiser
from trainer.diffusion.sampler import Variance, ancestral_step, draw_noise, sample, sampling_grid
from trainer.diffusion.schedule import build_alpha_bar
from trainer.objectives.progressive_distillation import HalvingGrid, halving_target
from trainer.stages import grid, halve, halving_counts


def plain_cosine(steps: int) -> Tensor:
    """alpha_bar of the cosine schedule without the offset 0.008, log-SNR from 20 to -20, on which the table was measured.

    Source: Salimans & Ho 2022, arXiv:2202.00512, in its code; with the offset, numbers differ by up to 2.4e-3."""
    start, end = math.atan(math.exp(-10)), math.atan(math.exp(10))
    u = (torch.arange(steps, dtype=torch.float64) + 1) / steps
    return torch.cos(start + (end - start) * u) ** 2


COSINE_1024 = plain_cosine(1024)


def exact_gains(alpha_bar: Tensor, data_std: float) -> Tensor:
    """c_t = E[x_0 | x_t] / x_t at every level."""
    signal = alpha_bar * data_std**2
    return alpha_bar.sqrt() * data_std**2 / (signal + 1 - alpha_bar)


def linear_denoiser(gains: Tensor) -> Denoiser:
    """The network that predicts x_0 = c_t x_t; NaN on levels which it was never trained on."""
    return lambda x_t, timestep: gains[timestep.long()].view(-1, 1, 1, 1) * x_t


def student_gains(teacher_gains: Tensor, timesteps: Sequence[int], *, alpha_bar: Tensor, target: Sampler) -> Tensor:
    """The exact fit of a student: the target is linear in x_t, so its value at x_t = 1 is the regression coefficient."""
    halving = HalvingGrid.build(alpha_bar, timesteps, dtype=torch.float64)
    levels = torch.arange(len(halving))
    x_t = torch.ones(len(halving), 1, 1, 1, dtype=torch.float64)
    fit = halving_target(linear_denoiser(teacher_gains), x_t, levels=levels, grid=halving, prediction="x_0", target=target)
    gains = torch.full_like(teacher_gains, torch.nan)
    gains[halving.timestep.long()] = fit.flatten()
    return gains


def distilled_gains(alpha_bar: Tensor, data_std: float, *, target: Sampler) -> dict[int, Tensor]:
    """The gains of the teacher and of every student of a chain down to one step, by step count."""
    timesteps = tuple(range(len(alpha_bar)))
    chain = {len(timesteps): exact_gains(alpha_bar, data_std)}
    while len(timesteps) > 1:
        gains = student_gains(chain[len(timesteps)], timesteps, alpha_bar=alpha_bar, target=target)
        timesteps = halve(timesteps)
        chain[len(timesteps)] = gains
    return chain


def sampled_std(
    gains: Tensor, timesteps: Sequence[int], *, alpha_bar: Tensor, sampler: Sampler, variance: Variance = "fixed_small"
) -> float:
    """Standard deviation of unclipped samples, exactly: every step is linear in x_t and in its noise."""
    levels = sampling_grid(alpha_bar, timesteps)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    if sampler == "ddim":
        return abs(sample(linear_denoiser(gains), one, levels, prediction="x_0", sampler="ddim", clip=False).item())
    squared = 1.0
    for k, (timestep, level) in enumerate(zip(levels.timesteps, levels.alpha_bar, strict=True)):
        last = k == len(levels.timesteps) - 1
        below = levels.final if last else levels.alpha_bar[k + 1]
        x_0 = gains[timestep] * one
        mean = ancestral_step(x_0, one, alpha_bar_t=level, alpha_bar_s=below).item()
        spread = ancestral_step(0 * one, 0 * one, alpha_bar_t=level, alpha_bar_s=below, variance=variance, noise=one).item()
        squared = mean**2 * squared + (0.0 if last else spread**2)
    return math.sqrt(squared)


COUNTS = (512, 128, 32, 16, 8, 4, 2, 1)
TABLE: dict[tuple[Sampler | None, Sampler], tuple[float, ...]] = {
    ("ddim", "ddim"): (0.4992, 0.4992, 0.4992, 0.4992, 0.4992, 0.4992, 0.4992, 0.4992),
    ("ancestral", "ddim"): (0.5000, 0.5041, 0.5186, 0.5344, 0.5586, 0.5889, 0.6154, 0.6154),
    ("ddim", "ancestral"): (0.4972, 0.4924, 0.4783, 0.4659, 0.4511, 0.4413, 0.4497, 0.4992),
    ("ancestral", "ancestral"): (0.4981, 0.4983, 0.4995, 0.5012, 0.5041, 0.5078, 0.5135, 0.6154),
    (None, "ddim"): (0.4985, 0.4940, 0.4765, 0.4539, 0.4114, 0.3334, 0.2000, 0.0000),
}


@pytest.mark.parametrize(("target", "sampler"), TABLE, ids=lambda name: str(name))
def test_the_table_of_targets_and_samplers_holds(target: Sampler | None, sampler: Sampler) -> None:
    chain = {} if target is None else distilled_gains(COSINE_1024, 0.5, target=target)
    teacher = exact_gains(COSINE_1024, 0.5)
    measured = [sampled_std(chain.get(n, teacher), grid(1024, n), alpha_bar=COSINE_1024, sampler=sampler) for n in COUNTS]
    assert measured == pytest.approx(TABLE[target, sampler], abs=1e-4)


def test_large_variance_is_too_wide_with_either_target() -> None:
    wanted: dict[Sampler, float] = {"ddim": 0.621, "ancestral": 0.680}
    for target in wanted:
        gains = distilled_gains(COSINE_1024, 0.5, target=target)[8]
        measured = sampled_std(gains, grid(1024, 8), alpha_bar=COSINE_1024, sampler="ancestral", variance="fixed_large")
        assert measured == pytest.approx(wanted[target], abs=1e-3)


def test_a_linear_schedule_of_a_thousand_steps_has_its_measured_values_after_three_halvings() -> None:
    table = build_alpha_bar(LinearNoiseSchedule())
    wanted: dict[Sampler, float] = {"ddim": 0.4985, "ancestral": 0.4968}
    for target in wanted:
        gains = distilled_gains(table, 0.5, target=target)[125]
        assert sampled_std(gains, grid(1000, 125), alpha_bar=table, sampler=target) == pytest.approx(wanted[target], abs=1e-4)


def test_the_sampling_loop_draws_images_of_the_computed_spread() -> None:
    gains = distilled_gains(COSINE_1024, 0.5, target="ancestral")[8]
    wanted = sampled_std(gains, grid(1024, 8), alpha_bar=COSINE_1024, sampler="ancestral")
    x_T, generators = draw_noise(0, 1, (1, 512, 512))
    levels = sampling_grid(COSINE_1024, grid(1024, 8))
    images = sample(linear_denoiser(gains.float()), x_T, levels, prediction="x_0", sampler="ancestral", clip=False, generators=generators)
    # Five standard errors of a standard deviation over 2^18 pixels.
    assert images.std().item() == pytest.approx(wanted, abs=5 * wanted / math.sqrt(2**19))


def scalar_chain(
    alpha_bar: Sequence[float], data_std: float, *, target: Sampler, sampler: Sampler
) -> dict[int, tuple[dict[int, float], float]]:
    """Gains and sample spread by step count, in scalars alone, by the printed Algorithm 2 and the printed DDPM posterior."""

    def a(t: int) -> float:
        return math.sqrt(alpha_bar[t]) if t >= 0 else 1.0

    def s(t: int) -> float:
        return math.sqrt(1 - alpha_bar[t]) if t >= 0 else 0.0

    def halved(gains: dict[int, float], noisy_first: list[int]) -> dict[int, float]:
        fitted = {}
        for k in range(0, len(noisy_first), 2):
            t, *below = [*noisy_first[k : k + 3], -1][:3]
            if below == [-1]:
                fitted[t] = gains[t]
                continue
            mid, end = below
            z_mid = a(mid) * gains[t] + s(mid) / s(t) * (1 - a(t) * gains[t])
            z_end = a(end) * gains[mid] * z_mid + s(end) / s(mid) * (z_mid - a(mid) * gains[mid] * z_mid)
            x = (z_end - s(end) / s(t)) / (a(end) - s(end) / s(t) * a(t))
            fitted[t] = x if target == "ddim" else gains[mid] * z_mid
        return fitted

    def spread(gains: dict[int, float], noisy_first: list[int]) -> float:
        squared = 1.0
        for t, below in zip(noisy_first, [*noisy_first[1:], -1], strict=True):
            if sampler == "ddim":
                squared *= (a(below) * gains[t] + s(below) * (1 - a(t) * gains[t]) / s(t)) ** 2
            else:
                alpha = (a(t) / a(below)) ** 2
                mean = a(below) * (1 - alpha) / s(t) ** 2 * gains[t] + math.sqrt(alpha) * s(below) ** 2 / s(t) ** 2
                squared = mean**2 * squared + s(below) ** 2 / s(t) ** 2 * (1 - alpha)
        return math.sqrt(squared)

    noisy_first = list(range(len(alpha_bar) - 1, -1, -1))
    gains = {t: a(t) * data_std**2 / (a(t) ** 2 * data_std**2 + s(t) ** 2) for t in noisy_first}
    chain = {}
    while True:
        chain[len(noisy_first)] = (gains, spread(gains, noisy_first))
        if len(noisy_first) == 1:
            return chain
        gains, noisy_first = halved(gains, noisy_first), noisy_first[::2]


@pytest.mark.parametrize("data_std", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", [LinearNoiseSchedule(), CosineNoiseSchedule(), CosineNoiseSchedule(steps=77)], ids=str)
@pytest.mark.parametrize("target", ["ddim", "ancestral"])
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_chains_through_odd_counts_equal_an_independent_recursion(
    data_std: float, schedule: NoiseScheduleConfig, target: Sampler, sampler: Sampler
) -> None:
    table = build_alpha_bar(schedule)
    ours = distilled_gains(table, data_std, target=target)
    recursion = scalar_chain(table.tolist(), data_std, target=target, sampler=sampler)
    assert tuple(ours) == tuple(recursion) == halving_counts(schedule.steps, 1)
    for count, (gains, spread) in recursion.items():
        timesteps = grid(schedule.steps, count)
        assert sorted(gains) == list(timesteps)
        torch.testing.assert_close(ours[count][list(timesteps)], table.new_tensor([gains[t] for t in timesteps]), rtol=1e-8, atol=1e-10)
        assert sampled_std(ours[count], timesteps, alpha_bar=table, sampler=sampler) == pytest.approx(spread, rel=1e-7, abs=1e-9)
