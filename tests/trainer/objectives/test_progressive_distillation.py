"""Halving targets against the paper's algorithm, written out, and against the sampler."""

from itertools import product

import pytest
import torch
from torch import Tensor

from trainer.config_sections import (
    CosineClampedNoiseSchedule,
    CosineNoiseSchedule,
    DistillationLoss,
    LinearNoiseSchedule,
    NoiseScheduleConfig,
    Prediction,
    Sampler,
)
from trainer.diffusion.parameterization import Denoiser, from_x_0, to_eps, to_x_0
from trainer.diffusion.sampler import SamplingGrid, ddim_step, sample
from trainer.diffusion.schedule import alpha_sigma, build_alpha_bar
from trainer.objectives.progressive_distillation import HalvingGrid, halving_lesson, halving_target
from trainer.stages import grid, halve

KINDS: tuple[Prediction, ...] = ("v", "eps", "x_0")
TARGETS: tuple[Sampler, ...] = ("ddim", "ancestral")
LOSSES: tuple[DistillationLoss, ...] = ("v_mse", "x_mse", "eps_mse", "min_snr", "snr_trunc")
LINEAR, CLAMPED = build_alpha_bar(LinearNoiseSchedule()), build_alpha_bar(CosineClampedNoiseSchedule())
COUNTS = (1000, 250, 125, 63, 8, 2)


def teacher(x_t: Tensor, timestep: Tensor) -> Tensor:
    """A smooth stand-in for a network, which mixes channels and depends on the time."""
    return torch.tanh(x_t.roll(1, dims=1) * (0.2 + timestep.to(x_t).view(-1, 1, 1, 1) / 1000)) + 0.3 * x_t


def draw_x_t(count: int) -> Tensor:
    return torch.randn(count, 2, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def algorithm_2(z_t: Tensor, k: int, *, alpha_bar: Tensor, timesteps: tuple[int, ...], prediction: Prediction) -> Tensor:
    """The target of Salimans & Ho 2022, Algorithm 2, as printed, at position k of the teacher's ascending timesteps."""

    def x_hat(z: Tensor, position: int) -> Tensor:
        output = teacher(z, torch.full((len(z),), float(timesteps[position]), dtype=torch.float64))
        return to_x_0(output, z, alpha_t=a(position), sigma_t=s(position), kind=prediction)

    def a(position: int) -> float:
        return 1.0 if position < 0 else float(alpha_bar[timesteps[position]]) ** 0.5

    def s(position: int) -> float:
        return 0.0 if position < 0 else (1 - float(alpha_bar[timesteps[position]])) ** 0.5

    z_1 = a(k - 1) * x_hat(z_t, k) + s(k - 1) / s(k) * (z_t - a(k) * x_hat(z_t, k))
    z_2 = a(k - 2) * x_hat(z_1, k - 1) + s(k - 2) / s(k - 1) * (z_1 - a(k - 1) * x_hat(z_1, k - 1))
    return (z_2 - s(k - 2) / s(k) * z_t) / (a(k - 2) - s(k - 2) / s(k) * a(k))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("schedule", [LinearNoiseSchedule(), CosineNoiseSchedule()], ids=["linear", "cosine"])
def test_the_ddim_target_is_algorithm_2_as_printed(count: int, prediction: Prediction, schedule: NoiseScheduleConfig) -> None:
    alpha_bar, timesteps = build_alpha_bar(schedule), grid(1000, count)
    halving = HalvingGrid.build(alpha_bar, timesteps, dtype=torch.float64)
    levels = torch.arange(count % 2, len(halving))[:: max(1, len(halving) // 16)]
    x_t = draw_x_t(len(levels))
    ours = halving_target(teacher, x_t, levels=levels, grid=halving, prediction=prediction, target="ddim")
    for i, level in enumerate(levels.tolist()):
        position = timesteps.index(int(halving.timestep[level]))
        printed = algorithm_2(x_t[i : i + 1], position, alpha_bar=alpha_bar, timesteps=timesteps, prediction=prediction)
        torch.testing.assert_close(ours[i : i + 1], printed, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("count", COUNTS)
def test_fp32_targets_are_those_of_fp64(count: int) -> None:
    exact, single = (HalvingGrid.build(LINEAR, grid(1000, count), dtype=dtype) for dtype in (torch.float64, torch.float32))
    levels = torch.arange(len(exact))
    x_t = draw_x_t(len(levels))
    wanted = halving_target(teacher, x_t, levels=levels, grid=exact, prediction="v", target="ddim")
    ours = halving_target(teacher, x_t.float(), levels=levels, grid=single, prediction="v", target="ddim")
    torch.testing.assert_close(ours.double(), wanted, rtol=0, atol=5e-6)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("prediction", KINDS)
def test_one_ddim_step_of_the_student_lands_where_two_of_the_teachers_sampler_do(count: int, prediction: Prediction) -> None:
    timesteps = grid(1000, count)
    halving = HalvingGrid.build(CLAMPED, timesteps, dtype=torch.float64)
    for level in range(len(halving))[:: max(1, len(halving) // 16)]:
        x_t = draw_x_t(3)
        clean = halving_target(teacher, x_t, levels=torch.tensor([level] * 3), grid=halving, prediction=prediction, target="ddim")
        k = timesteps.index(int(halving.timestep[level]))
        covered = timesteps[max(k - 1, 0) : k + 1][::-1]
        final = float(CLAMPED[timesteps[k - 2]]) if k >= 2 else 1.0
        steps = SamplingGrid(timesteps=covered, alpha_bar=tuple(float(CLAMPED[t]) for t in covered), final=final)
        landed = sample(teacher, x_t, steps, prediction=prediction, sampler="ddim", clip=False)
        scales = {"alpha_t": float(halving.alpha_t[level]), "sigma_t": float(halving.sigma_t[level])}
        eps = to_eps(clean, x_t, **scales, kind="x_0")
        student = ddim_step(clean, eps, alpha_s=final**0.5, sigma_s=(1 - final) ** 0.5)
        torch.testing.assert_close(student, landed, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("prediction", KINDS)
def test_the_ancestral_target_is_the_teachers_clean_image_at_its_second_level(prediction: Prediction) -> None:
    timesteps = grid(1000, 250)
    halving = HalvingGrid.build(LINEAR, timesteps, dtype=torch.float64)
    levels = torch.arange(len(halving))
    x_t = draw_x_t(len(levels))
    ours = halving_target(teacher, x_t, levels=levels, grid=halving, prediction=prediction, target="ancestral")
    for k in range(1, 250, 2):
        level, (t, mid) = k // 2, (timesteps[k], timesteps[k - 1])
        second = SamplingGrid(timesteps=(t,), alpha_bar=(float(LINEAR[t]),), final=float(LINEAR[mid]))
        x_mid = sample(teacher, x_t[level : level + 1], second, prediction=prediction, sampler="ddim", clip=False)
        alpha_mid, sigma_mid = (float(scale) for scale in alpha_sigma(LINEAR[mid]))
        output = teacher(x_mid, torch.tensor([float(mid)], dtype=torch.float64))
        x_2 = to_x_0(output, x_mid, alpha_t=alpha_mid, sigma_t=sigma_mid, kind=prediction)
        torch.testing.assert_close(ours[level : level + 1], x_2, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("target", "prediction"), list(product(TARGETS, KINDS)))
def test_a_step_over_a_single_teacher_step_has_the_teachers_own_clean_image_as_target(target: Sampler, prediction: Prediction) -> None:
    halving = HalvingGrid.build(CLAMPED, grid(1000, 125))
    assert len(halving) == 63 and halving.timestep[0] == halving.later[0].timestep[0] == 7
    x_t = draw_x_t(4).float()
    ours = halving_target(teacher, x_t, levels=torch.zeros(4, dtype=torch.int64), grid=halving, prediction=prediction, target=target)
    alpha_t, sigma_t = (float(scale) for scale in alpha_sigma(CLAMPED[7]))
    x_1 = to_x_0(teacher(x_t, torch.full((4,), 7.0)), x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
    torch.testing.assert_close(ours, x_1)


@pytest.mark.parametrize("table", [LINEAR, CLAMPED, build_alpha_bar(CosineNoiseSchedule())], ids=["linear", "clamped", "cosine"])
@pytest.mark.parametrize("count", COUNTS)
def test_shares_are_finite_and_make_every_target_a_convex_combination(table: Tensor, count: int) -> None:
    halving = HalvingGrid.build(table, grid(1000, count))
    assert all(bool(((step.share >= 0) & (step.share <= 1)).all()) for step in halving.later)
    assert halving.timestep.tolist() == list(halve(grid(1000, count)))


@pytest.mark.parametrize(("prediction", "target", "loss"), list(product(KINDS, TARGETS, LOSSES)))
@pytest.mark.parametrize("clip_target", [False, True])
def test_a_copied_student_of_a_teacher_that_is_exact_for_one_image_has_no_loss(
    prediction: Prediction, target: Sampler, loss: DistillationLoss, clip_target: bool
) -> None:
    image = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1

    def exact(x_t: Tensor, timestep: Tensor) -> Tensor:
        alpha_t, sigma_t = (scale.view(-1, 1, 1, 1) for scale in alpha_sigma(LINEAR[timestep.long()]))
        return from_x_0(image.expand_as(x_t), x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)

    for count in (1000, 125, 2):
        halving = HalvingGrid.build(LINEAR, grid(1000, count), dtype=torch.float64)
        uniforms = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
        noise = torch.randn(16, 2, 3, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        lesson = halving_lesson(
            exact,
            image.expand_as(noise),
            noise=noise,
            uniforms=uniforms,
            grid=halving,
            prediction=prediction,
            target=target,
            loss=loss,
            clip_target=clip_target,
        )
        per_image = lesson.loss(exact)
        assert per_image.shape == (16,)
        assert per_image.max().item() < 1e-12


def test_the_teacher_is_asked_twice_the_student_once_and_only_the_student_learns() -> None:
    asked: list[tuple[str, list[float], bool]] = []
    gain = {name: torch.tensor(0.5, requires_grad=True) for name in ("student", "teacher")}

    def network(name: str) -> Denoiser:
        def denoise(x_t: Tensor, timestep: Tensor) -> Tensor:
            asked.append((name, timestep.tolist(), torch.is_grad_enabled()))
            return gain[name] * x_t

        return denoise

    halving = HalvingGrid.build(LINEAR, grid(1000, 8))
    noise = draw_x_t(4).float()
    uniforms = torch.tensor([0.0, 0.25, 0.5, 0.99], dtype=torch.float64)
    lesson = halving_lesson(
        network("teacher"),
        noise.tanh(),
        noise=noise,
        uniforms=uniforms,
        grid=halving,
        prediction="v",
        target="ddim",
        loss="v_mse",
    )
    lesson.loss(network("student")).sum().backward()
    levels, mids = [231.0, 487.0, 743.0, 999.0], [103.0, 359.0, 615.0, 871.0]
    assert asked == [("teacher", levels, False), ("teacher", mids, False), ("student", levels, True)]
    assert gain["student"].grad is not None and gain["teacher"].grad is None


def test_a_clipped_target_stays_in_range_and_a_tame_one_is_left_alone() -> None:
    halving = HalvingGrid.build(LINEAR, grid(1000, 63))
    levels = torch.arange(len(halving))
    x_t = 3 * draw_x_t(len(levels)).float()

    def target(denoiser: Denoiser, *, clip_target: bool) -> Tensor:
        return halving_target(denoiser, x_t, levels=levels, grid=halving, prediction="x_0", target="ddim", clip_target=clip_target)

    assert target(teacher, clip_target=False).abs().max().item() > 1
    assert target(teacher, clip_target=True).abs().max().item() <= 1

    def tame(x_t: Tensor, timestep: Tensor) -> Tensor:
        return torch.tanh(x_t)

    assert torch.equal(target(tame, clip_target=True), target(tame, clip_target=False))


def test_losses_differ_by_their_weights_alone() -> None:
    halving = HalvingGrid.build(LINEAR, grid(1000, 16), dtype=torch.float64)
    noise = draw_x_t(8)
    uniforms = (torch.arange(8, dtype=torch.float64) + 0.5) / 8

    def measure(loss: DistillationLoss) -> Tensor:
        lesson = halving_lesson(
            teacher,
            noise.tanh(),
            noise=noise,
            uniforms=uniforms,
            grid=halving,
            prediction="v",
            target="ddim",
            loss=loss,
            min_snr_gamma=2.0,
        )
        return lesson.loss(lambda x_t, _: 0.1 * x_t)

    snr = (halving.alpha_t / halving.sigma_t) ** 2
    torch.testing.assert_close(measure("v_mse"), (1 + snr) * measure("x_mse"))
    torch.testing.assert_close(measure("eps_mse"), snr * measure("x_mse"))
    torch.testing.assert_close(measure("snr_trunc"), snr.clamp(min=1) * measure("x_mse"))
    torch.testing.assert_close(measure("min_snr"), snr.clamp(max=2.0) * measure("x_mse"))


def test_a_teacher_of_one_step_cannot_be_halved() -> None:
    with pytest.raises(ValueError, match="wanted at least 2"):
        HalvingGrid.build(LINEAR, (999,))


@pytest.mark.parametrize(("count", "steps"), [(1000, 250), (250, 63), (125, 32), (63, 8), (63, 4), (16, 1), (3, 1)])
@pytest.mark.parametrize("prediction", KINDS)
def test_one_ddim_step_of_a_student_lands_where_all_the_teachers_steps_that_it_covers_do(
    count: int, steps: int, prediction: Prediction
) -> None:
    timesteps = grid(1000, count)
    halving = HalvingGrid.build(CLAMPED, timesteps, student_steps=steps, dtype=torch.float64)
    assert [int(timestep) for timestep in halving.timestep] == list(grid(1000, steps))
    covered_steps = len(halving.later) + 1
    for level in range(len(halving))[:: max(1, len(halving) // 8)]:
        x_t = draw_x_t(3)
        clean = halving_target(teacher, x_t, levels=torch.tensor([level] * 3), grid=halving, prediction=prediction, target="ddim")
        k = timesteps.index(int(halving.timestep[level]))
        covered = timesteps[max(k - covered_steps + 1, 0) : k + 1][::-1]
        final = float(CLAMPED[timesteps[k - covered_steps]]) if k >= covered_steps else 1.0
        walk = SamplingGrid(timesteps=covered, alpha_bar=tuple(float(CLAMPED[t]) for t in covered), final=final)
        landed = sample(teacher, x_t, walk, prediction=prediction, sampler="ddim", clip=False)
        scales = {"alpha_t": float(halving.alpha_t[level]), "sigma_t": float(halving.sigma_t[level])}
        eps = to_eps(clean, x_t, **scales, kind="x_0")
        student = ddim_step(clean, eps, alpha_s=final**0.5, sigma_s=(1 - final) ** 0.5)
        torch.testing.assert_close(student, landed, rtol=1e-8, atol=1e-8)


def test_a_student_of_its_teachers_steps_is_asked_for_the_teachers_own_clean_image() -> None:
    halving = HalvingGrid.build(LINEAR, grid(1000, 125), student_steps=125, dtype=torch.float64)
    levels = torch.arange(125)
    x_t = draw_x_t(125)
    ours = halving_target(teacher, x_t, levels=levels, grid=halving, prediction="eps", target="ddim")
    alpha_t, sigma_t = (scale.view(-1, 1, 1, 1) for scale in alpha_sigma(LINEAR[list(grid(1000, 125))]))
    torch.testing.assert_close(ours, (x_t - sigma_t * teacher(x_t, halving.timestep)) / alpha_t)


@pytest.mark.parametrize("progress", [0.0, 0.5])
def test_while_its_head_turns_a_student_that_knows_the_teachers_clean_image_has_no_loss(progress: float) -> None:
    halving = HalvingGrid.build(LINEAR, grid(1000, 32), student_steps=32, dtype=torch.float64)
    noise = draw_x_t(16)
    uniforms = (torch.arange(16, dtype=torch.float64) + 0.5) / 16
    lesson = halving_lesson(
        teacher,
        noise.tanh(),
        noise=noise,
        uniforms=uniforms,
        grid=halving,
        prediction="v",
        target="ddim",
        loss="v_mse",
        teacher_prediction="eps",
        progress=progress,
    )

    def student(x_t: Tensor, timestep: Tensor) -> Tensor:
        alpha_t, sigma_t = (scale.view(-1, 1, 1, 1) for scale in alpha_sigma(LINEAR[timestep.long()]))
        eps = teacher(x_t, timestep)
        phi = progress * torch.atan2(sigma_t, alpha_t)
        return phi.cos() * eps - phi.sin() * (x_t - sigma_t * eps) / alpha_t

    assert lesson.loss(student).max().item() < 1e-18


def test_the_feature_loss_is_added_to_the_squared_error_and_is_nothing_for_the_target_itself() -> None:
    halving = HalvingGrid.build(LINEAR, grid(1000, 8))
    noise = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    uniforms = torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64)

    def measure(student: Denoiser, feature_weight: float | None) -> Tensor:
        lesson = halving_lesson(
            teacher,
            noise.tanh(),
            noise=noise,
            uniforms=uniforms,
            grid=halving,
            prediction="v",
            target="ddim",
            loss="v_mse",
            feature_weight=feature_weight,
        )
        return lesson.loss((lambda x_t, timestep: lesson.wanted) if student is teacher else student)

    def other(x_t: Tensor, timestep: Tensor) -> Tensor:
        return 0.1 * x_t

    plain, once, twice = (measure(other, weight) for weight in (None, 1.0, 2.0))
    assert bool((once > plain).all())
    torch.testing.assert_close(twice - plain, 2 * (once - plain))
    assert measure(teacher, 1.0).max().item() < 1e-6
