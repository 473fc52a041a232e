"""Noise schedules against diffusers' tables and closed forms."""

import math

import pytest
import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler, rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_unclip import UnCLIPScheduler

from trainer.architectures import read_architecture
from trainer.config_sections import (
    CosineClampedNoiseSchedule,
    CosineNoiseSchedule,
    GivenNoiseSchedule,
    LinearNoiseSchedule,
    NoiseScheduleConfig,
    ScaledLinearNoiseSchedule,
)
from trainer.diffusion.schedule import (
    alpha_bar_of_scheduler,
    alpha_bar_sha256,
    alpha_sigma,
    build_alpha_bar,
    draw_index,
    log_snr,
    respaced_betas,
    zero_terminal_snr,
)
from trainer.models.from_config import build_scheduler
from trainer.stages import grid

SCHEDULES: tuple[NoiseScheduleConfig, ...] = (
    LinearNoiseSchedule(),
    ScaledLinearNoiseSchedule(),
    CosineNoiseSchedule(),
    CosineClampedNoiseSchedule(),
    GivenNoiseSchedule(betas=(0.1, 0.2, 0.5, 0.9)),
)


@pytest.mark.parametrize(
    ("ours", "scheduler"),
    [
        (LinearNoiseSchedule(), DDPMScheduler(beta_schedule="linear")),
        (ScaledLinearNoiseSchedule(), DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)),
        (CosineNoiseSchedule(), DDPMScheduler(beta_schedule="squaredcos_cap_v2")),
        (CosineNoiseSchedule(steps=64), DDPMScheduler(beta_schedule="squaredcos_cap_v2", num_train_timesteps=64)),
        (GivenNoiseSchedule(betas=(0.1, 0.2, 0.5)), DDPMScheduler(num_train_timesteps=3, trained_betas=[0.1, 0.2, 0.5])),
    ],
)
def test_tables_are_those_of_diffusers(ours: NoiseScheduleConfig, scheduler: DDPMScheduler) -> None:
    # diffusers multiplies a thousand fp32 factors.
    torch.testing.assert_close(build_alpha_bar(ours), scheduler.alphas_cumprod.double(), rtol=5e-5, atol=0)


def test_the_ends_of_well_known_schedules_have_their_measured_values() -> None:
    linear, latent = build_alpha_bar(LinearNoiseSchedule()), build_alpha_bar(ScaledLinearNoiseSchedule())
    assert linear[-1].item() == pytest.approx(4.036e-5, rel=1e-3)
    assert log_snr(linear)[[0, -1]].tolist() == pytest.approx([9.21, -10.12], abs=5e-3)
    assert log_snr(latent)[[0, -1]].tolist() == pytest.approx([7.07, -5.36], abs=5e-3)


def test_the_clamped_cosine_is_the_squared_cosine_within_its_bounds() -> None:
    table = build_alpha_bar(CosineClampedNoiseSchedule(steps=1000))
    assert table[499].item() == pytest.approx(math.cos((0.5 + 0.008) / 1.008 * math.pi / 2) ** 2, rel=1e-14)
    assert table[-1].item() == 1e-5
    assert build_alpha_bar(CosineClampedNoiseSchedule(steps=10**5)).max().item() <= 0.9999


def test_cosine_levels_nest_when_the_step_count_is_halved() -> None:
    fine, coarse = build_alpha_bar(CosineNoiseSchedule(steps=1024)), build_alpha_bar(CosineNoiseSchedule(steps=512))
    torch.testing.assert_close(fine[1:-1:2], coarse[:-1], rtol=0, atol=1e-14)
    assert [fine[-1].item(), coarse[-1].item()] == pytest.approx([2.3e-9, 9.3e-9], rel=0.02), "only the capped last beta breaks it"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_tables_are_fp64_and_fall_from_nearly_clean_to_nearly_noise(schedule: NoiseScheduleConfig) -> None:
    table = build_alpha_bar(schedule)
    assert table.dtype == torch.float64
    assert len(table) == schedule.steps
    assert bool((table.diff() <= 0).all()) and 0 < table[-1].item() <= table[0].item() < 1
    alpha_t, sigma_t = alpha_sigma(table)
    torch.testing.assert_close(alpha_t**2 + sigma_t**2, torch.ones_like(table), rtol=0, atol=1e-15)
    torch.testing.assert_close(log_snr(table).exp(), (alpha_t / sigma_t) ** 2)


@pytest.mark.parametrize("schedule", SCHEDULES[:4], ids=lambda schedule: schedule.kind)
@pytest.mark.parametrize("count", [1000, 500, 63, 8, 1])
def test_respaced_betas_multiply_up_to_the_levels_of_the_full_table(schedule: NoiseScheduleConfig, count: int) -> None:
    table, timesteps = build_alpha_bar(schedule), grid(1000, count)
    betas = torch.tensor(respaced_betas(table, timesteps), dtype=torch.float64)
    torch.testing.assert_close((1 - betas).cumprod(0), table[list(timesteps)], rtol=1e-9, atol=1e-15)


def test_the_hash_is_that_of_the_tables_bytes_and_tells_schedules_apart() -> None:
    assert alpha_bar_sha256(torch.tensor([0.5], dtype=torch.float64)) == "4cfa5b42ca669328764e67cd9a34bb8f90b16ed7ca8d85e8443783d7ccce15ed"
    assert len({alpha_bar_sha256(build_alpha_bar(schedule)) for schedule in SCHEDULES}) == len(SCHEDULES)


def test_indices_cover_the_range_evenly_and_never_reach_its_end() -> None:
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    assert draw_index(uniforms, 8).bincount().tolist() == [125] * 8
    for count in range(1, 10000):
        assert draw_index(torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64), count).tolist() == [0, count - 1]
        assert draw_index(torch.tensor([0.0, 1 - 2**-24]), count).tolist() == [0, count - 1]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.kind)
def test_zero_terminal_snr_is_that_of_diffusers_and_ends_in_noise_alone(schedule: NoiseScheduleConfig) -> None:
    table = build_alpha_bar(schedule)
    rescaled = zero_terminal_snr(table)
    betas = torch.tensor(respaced_betas(table, range(len(table))), dtype=torch.float64)
    # Where a clamped schedule has its last level twice, diffusers divides 0 by 0.
    wanted = (1 - rescale_zero_terminal_snr(betas)).cumprod(0).nan_to_num()
    torch.testing.assert_close(rescaled, wanted, rtol=0, atol=1e-6)
    assert rescaled[-1].item() == 0.0 and rescaled[0].item() == pytest.approx(table[0].item(), rel=1e-14)
    assert rescaled.dtype == torch.float64 and bool((rescaled.diff() <= 0).all())
    torch.testing.assert_close(zero_terminal_snr(rescaled), rescaled, rtol=1e-14, atol=0)


def test_a_schedule_that_does_not_fall_has_no_terminal_to_shift() -> None:
    with pytest.raises(ValueError, match="wanted one that falls"):
        zero_terminal_snr(torch.tensor([0.5], dtype=torch.float64))


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0015, "beta_end": 0.0195},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000, "trained_betas": None},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 256},
        {"beta_schedule": "scaled_linear", "trained_betas": [0.1, 0.2, 0.5, 0.9]},
    ],
)
def test_tables_of_scheduler_configs_are_those_of_diffusers(config: dict[str, object], *, rescaled: bool) -> None:
    config = {**config, "rescale_betas_zero_snr": rescaled, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    wanted = DDPMScheduler.from_config(config).alphas_cumprod  # pyright: ignore[reportAttributeAccessIssue]
    table = alpha_bar_of_scheduler(config)
    assert table.dtype == torch.float64
    # The first cosine beta and what follows it are 1 - a ratio next to 1, whose rounding grows along a thousand fp32 factors.
    torch.testing.assert_close(table, wanted.double(), rtol=5e-5, atol=1e-7)
    assert (table[-1].item() == 0.0) == rescaled


@pytest.mark.parametrize("steps", [1000, 64])
def test_unclip_without_a_beta_schedule_is_the_squared_cosine(steps: int) -> None:
    """As kandinsky-2-2-prior on the Hub has it: of diffusers' UnCLIPScheduler there is no other."""
    stock = UnCLIPScheduler(num_train_timesteps=steps, prediction_type="sample")
    written = dict(stock.config)
    config = {name: value for name, value in written.items() if name != "beta_schedule"} | {"_class_name": "UnCLIPScheduler"}
    table = alpha_bar_of_scheduler(config)
    torch.testing.assert_close(table, stock.alphas_cumprod.double(), rtol=5e-5, atol=1e-7)
    assert torch.equal(table, alpha_bar_of_scheduler(written))
    assert torch.equal(table, build_alpha_bar(CosineNoiseSchedule(steps=steps)))


@pytest.mark.parametrize("name", ["kandinsky22_prior", "kandinsky22_decoder", "stable_diffusion_1_5"])
def test_an_architectures_levels_are_those_of_the_scheduler_that_is_made_of_it(name: str) -> None:
    component = read_architecture(name).components["scheduler"]
    made = build_scheduler(component)
    given = alpha_bar_of_scheduler({**component.config, "_class_name": component.class_name})
    written = alpha_bar_of_scheduler(dict(made.config))  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(given, written)
    wanted = made.alphas_cumprod.double()  # pyright: ignore[reportAttributeAccessIssue]
    torch.testing.assert_close(given, wanted, rtol=5e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta_schedule": "sigmoid"}, "beta_schedule is 'sigmoid', wanted linear, scaled_linear or squaredcos_cap_v2"),
        ({"beta_start": "0.1"}, "beta_start is '0.1', wanted a number"),
        ({"trained_betas": "0.1"}, "trained_betas is '0.1', wanted a list of numbers"),
        ({"trained_betas": [0.1, None]}, r"trained_betas\[1\] is None, wanted a number"),
        ({"trained_betas": []}, "one at least"),
        ({"beta_end": 1.5}, r"lie in \[0, 1\]"),
        ({"num_train_timesteps": 0}, "one at least"),
    ],
)
def test_scheduler_configs_that_say_something_else_are_refused(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alpha_bar_of_scheduler(config)
