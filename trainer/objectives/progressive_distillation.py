"""Halving: a student learns to cover two (or one, four, eight ...) sampling steps of its teacher in one."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import assert_never, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.config_sections import DistillationLoss, Prediction, Sampler
from trainer.diffusion.parameterization import Denoiser, diffuse, from_x_0, to_eps, to_x_0
from trainer.diffusion.sampler import ddim_step
from trainer.diffusion.schedule import alpha_sigma, draw_index
from trainer.diffusion.turning import Turn
from trainer.objectives.autoencoding import edges_at_scales, feature_distance
from trainer.objectives.losses import loss_weight, squared_error
from trainer.stages import halve, halvings, keep


@final
@dataclass(frozen=True, eq=False)
class LaterStep:
    """Where the teacher stands before a further one of its steps, at each of the student's levels."""

    timestep: Float[Tensor, " n"]
    alpha_t: Float[Tensor, " n"]
    sigma_t: Float[Tensor, " n"]
    share: Float[Tensor, " n"]
    """Of the clean image predicted there in the ddim target so far, in [0, 1]; what was predicted before has the rest."""


@final
@dataclass(frozen=True, eq=False)
class HalvingGrid:
    """The student's noise levels, least noise first, each with the teacher's levels down its step.

    Scales are computed in fp64. A student's step covers 1, 2, 4 ... teacher steps. Where its last one covers fewer, the teacher
    stands still at its own last level: its clean images there are all the same, and have the whole share."""

    timestep: Float[Tensor, " n"]
    """Original timesteps, as the networks are conditioned on them."""
    alpha_t: Float[Tensor, " n"]
    sigma_t: Float[Tensor, " n"]
    later: tuple[LaterStep, ...]
    """The teacher's second step, and so on; none where the student takes the teacher's own steps."""

    @staticmethod
    def build(
        alpha_bar: Float64[Tensor, " T"],
        teacher_timesteps: Sequence[int],
        *,
        student_steps: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> "HalvingGrid":
        """The grid on which a student learns from the teacher of these ascending original timesteps.

        student_steps: as many as the teacher has, a half, a quarter ... of them, rounded up at every halving; None: a half.
        Raises: ValueError if no halving leads there, or a teacher of one step is to be halved."""
        count = len(teacher_timesteps)
        # Positions on the teacher's grid; -1 is the clean image after its last step.
        level = torch.tensor(halve(range(count)) if student_steps is None else keep(range(count), student_steps))
        covered = 2 if student_steps is None else 2 ** halvings(count, student_steps)
        positions = [(level - taken).clamp(min=0) for taken in range(covered)] + [(level - covered).clamp(min=-1)]
        timestep = torch.tensor(teacher_timesteps)
        alpha, sigma = alpha_sigma(alpha_bar.cpu()[timestep])
        rho = torch.cat([alpha / sigma, torch.tensor([torch.inf], dtype=torch.float64)])

        def column(values: Tensor) -> Float[Tensor, " n"]:
            return values.to(dtype=dtype, device=device)

        return HalvingGrid(
            timestep=column(timestep[level]),
            alpha_t=column(alpha[level]),
            sigma_t=column(sigma[level]),
            later=tuple(
                LaterStep(
                    timestep=column(timestep[at]),
                    alpha_t=column(alpha[at]),
                    sigma_t=column(sigma[at]),
                    share=column(second_share(rho[level], rho[at], rho_s=rho[end])),
                )
                for at, end in pairwise(positions[1:])
            ),
        )

    def __len__(self) -> int:
        """The student's sampling steps."""
        return len(self.timestep)


def second_share(rho_t: Float64[Tensor, " n"], rho_mid: Float64[Tensor, " n"], *, rho_s: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Share of the teacher's clean image x_2, predicted at mid, in x*, with which one DDIM step t -> s lands where t -> mid -> s does.

    rho = alpha / sigma, infinite at the clean image. A DDIM step adds (rho_s - rho_t) x_0 to x_t / sigma_t, hence
    (rho_s - rho_t) x* = (rho_mid - rho_t) x_1 + (rho_s - rho_mid) x_2: no difference of large numbers. x_1 may itself be such an
    x* of several steps t -> mid, so that n teacher steps are n - 1 shares, one after the other. Where the three levels
    are equal, as at the noisy end of a clamped schedule, any share does, and x_2 has all.
    Source: Salimans & Ho 2022, arXiv:2202.00512, Algorithm 2 and appendix G."""
    share = (rho_s - rho_mid) / (rho_s - rho_t)
    return torch.where(rho_s.isinf() | (rho_s == rho_t), 1.0, share)


@torch.no_grad()
def halving_target(
    teacher: Denoiser,
    x_t: Float[Tensor, "b c h w"],
    *,
    levels: Int64[Tensor, " b"],
    grid: HalvingGrid,
    prediction: Prediction,
    target: Sampler,
    clip_target: bool = False,
) -> Float[Tensor, "b c h w"]:
    """The student's x_0 target at x_t on its levels, without gradient; clean images span [-1, 1].

    prediction: the teacher's. ddim: one DDIM step of the student lands where its teacher's covered steps do. ancestral: the
    teacher's last clean image of them. clip_target: clips the teacher's clean images, and each of its steps follows the clipped one.
    Source: Salimans & Ho 2022, arXiv:2202.00512, Algorithm 2 (ddim); github.com/Hramchenko/diffusion_distiller (ancestral)."""

    def clean(x: Tensor, timestep: Tensor, *, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
        x_0 = to_x_0(teacher(x, timestep), x, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
        return x_0.clamp(-1, 1) if clip_target else x_0

    alpha_t, sigma_t = _per_image(grid.alpha_t, levels), _per_image(grid.sigma_t, levels)
    x_0 = wanted = clean(x_t, grid.timestep[levels], alpha_t=alpha_t, sigma_t=sigma_t)
    for step in grid.later:
        eps = to_eps(x_0, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind="x_0")
        alpha_t, sigma_t = _per_image(step.alpha_t, levels), _per_image(step.sigma_t, levels)
        x_t = ddim_step(x_0, eps, alpha_s=alpha_t, sigma_s=sigma_t)
        x_0 = clean(x_t, step.timestep[levels], alpha_t=alpha_t, sigma_t=sigma_t)
        match target:
            case "ddim":
                wanted = torch.lerp(wanted, x_0, _per_image(step.share, levels))
            case "ancestral":
                wanted = x_0
            case _:
                assert_never(target)
    return wanted


@final
@dataclass(frozen=True, eq=False)
class Lesson:
    """What a student is asked and should answer: of the teacher nothing is left to compute."""

    x_t: Float[Tensor, "b c h w"]
    timestep: Float[Tensor, " b"]
    wanted: Float[Tensor, "b c h w"]
    weight: Float[Tensor, " b"]
    seen: "Seen | None" = None
    """What the student's picture is compared with beside that; None: nothing."""

    def loss(self, student: Denoiser) -> Float[Tensor, " b"]:
        """Loss per image; the gradient flows through the student."""
        answer = student(self.x_t, self.timestep)
        loss = self.weight * squared_error(answer, self.wanted)
        return loss if self.seen is None else loss + self.seen.loss(answer, self.x_t)


@final
@dataclass(frozen=True, eq=False)
class Seen:
    """A clean image as people see it: edges at several scales, of which a smooth mean of many faces has few."""

    clean: Float[Tensor, "b c h w"]
    alpha_t: Float[Tensor, "b 1 1 1"]
    sigma_t: Float[Tensor, "b 1 1 1"]
    prediction: Prediction
    feature_weight: float

    def loss(self, answer: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"]) -> Float[Tensor, " b"]:
        """The weighted distance of features between the clean image that an answer implies and the target's."""
        x_0 = to_x_0(answer, x_t, alpha_t=self.alpha_t, sigma_t=self.sigma_t, kind=self.prediction)
        return self.feature_weight * feature_distance(x_0, self.clean, edges_at_scales)


def halving_lesson(
    teacher: Denoiser,
    x_0: Float[Tensor, "b c h w"],
    *,
    noise: Float[Tensor, "b c h w"],
    uniforms: Float[Tensor, " b"],
    grid: HalvingGrid,
    prediction: Prediction,
    target: Sampler,
    loss: DistillationLoss,
    clip_target: bool = False,
    min_snr_gamma: float = 5.0,
    teacher_prediction: Prediction | None = None,
    progress: float = 1.0,
    feature_weight: float | None = None,
) -> Lesson:
    """What the student should answer at x_0 with noise on its levels floor(uniforms * n).

    x_0: clean images on the scale [-1, 1]. noise: with any offset already in it. grid: on the device of x_0.
    teacher_prediction: where it differs from the student's (None: the same), and how far the student's head has turned from it,
    `progress` in [0, 1]; see `turning`. The error is always that of what the network puts out, weighted as the loss weighs the
    student's own prediction, so that the gain of the half-turned head does not weigh it. feature_weight: of `Seen`; None: without.
    Source: Salimans & Ho 2022, arXiv:2202.00512, Algorithm 2; for the losses see `loss_weight`."""
    levels = draw_index(uniforms.to(x_0.device), len(grid))
    alpha_t, sigma_t = _per_image(grid.alpha_t, levels), _per_image(grid.sigma_t, levels)
    x_t = diffuse(x_0, noise, alpha_t=alpha_t, sigma_t=sigma_t)
    turn = Turn(teacher_prediction or prediction, prediction)
    clean = halving_target(teacher, x_t, levels=levels, grid=grid, prediction=turn.start, target=target, clip_target=clip_target)
    if progress < 1 and turn.start != turn.end:
        wanted = turn.target(clean, x_t, progress=progress, alpha_t=alpha_t, sigma_t=sigma_t)
    else:
        wanted = from_x_0(clean, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
    weight = loss_weight(grid.alpha_t[levels], grid.sigma_t[levels], prediction=prediction, loss=loss, min_snr_gamma=min_snr_gamma)
    seen = None if feature_weight is None else Seen(clean, alpha_t, sigma_t, prediction, feature_weight)
    return Lesson(x_t, grid.timestep[levels], wanted, weight, seen)


def _per_image(column: Float[Tensor, " n"], levels: Int64[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return column[levels].view(-1, 1, 1, 1)
