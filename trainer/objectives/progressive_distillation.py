"""Halving: a student learns to cover two sampling steps of its teacher in one."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import assert_never, final

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.config_sections import DistillationLoss, Prediction, Sampler
from trainer.diffusion.parameterization import Denoiser, diffuse, from_x_0, to_eps, to_x_0
from trainer.diffusion.sampler import ddim_step
from trainer.diffusion.schedule import alpha_sigma, draw_index
from trainer.objectives.losses import loss_weight, squared_error
from trainer.stages import halve


@final
@dataclass(frozen=True, eq=False)
class HalvingGrid:
    """The student's noise levels, least noise first, each with the teacher's level half-way down its step.

    Scales are computed in fp64. Where a step covers a single teacher step, the half-way level is the level itself: the teacher's
    second clean image is then its first one, and either target is that image."""

    timestep: Float[Tensor, " n"]
    """Original timesteps, as the networks are conditioned on them."""
    alpha_t: Float[Tensor, " n"]
    sigma_t: Float[Tensor, " n"]
    timestep_mid: Float[Tensor, " n"]
    alpha_mid: Float[Tensor, " n"]
    sigma_mid: Float[Tensor, " n"]
    share: Float[Tensor, " n"]
    """Of the teacher's second clean image in the ddim target, in [0, 1]; the first one has the rest."""

    @staticmethod
    def build(
        alpha_bar: Float64[Tensor, " T"],
        teacher_timesteps: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> "HalvingGrid":
        """The grid on which the teacher of these ascending original timesteps is halved.

        Raises: ValueError if it has fewer than two."""
        # Positions on the teacher's grid; -1 is the clean image after its last step.
        level = torch.tensor(halve(range(len(teacher_timesteps))))
        mid, end = (level - 1).clamp(min=0), (level - 2).clamp(min=-1)
        timestep = torch.tensor(teacher_timesteps)
        alpha, sigma = alpha_sigma(alpha_bar.cpu()[timestep])
        rho = torch.cat([alpha / sigma, torch.tensor([torch.inf], dtype=torch.float64)])

        def column(values: Tensor) -> Float[Tensor, " n"]:
            return values.to(dtype=dtype, device=device)

        return HalvingGrid(
            timestep=column(timestep[level]),
            alpha_t=column(alpha[level]),
            sigma_t=column(sigma[level]),
            timestep_mid=column(timestep[mid]),
            alpha_mid=column(alpha[mid]),
            sigma_mid=column(sigma[mid]),
            share=column(second_share(rho[level], rho[mid], rho_s=rho[end])),
        )

    def __len__(self) -> int:
        """The student's sampling steps."""
        return len(self.timestep)


def second_share(rho_t: Float64[Tensor, " n"], rho_mid: Float64[Tensor, " n"], *, rho_s: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Share of the teacher's second clean image x_2 in x*, with which one DDIM step t -> s lands where t -> mid -> s does.

    rho = alpha / sigma, infinite at the clean image. A DDIM step adds (rho_s - rho_t) x_0 to x_t / sigma_t, hence
    (rho_s - rho_t) x* = (rho_mid - rho_t) x_1 + (rho_s - rho_mid) x_2: no difference of large numbers. Where the three levels
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

    ddim: one DDIM step of the student lands where two of the teacher do. ancestral: the teacher's second clean image.
    clip_target: clips the teacher's clean images, and each of its steps follows the clipped one.
    Source: Salimans & Ho 2022, arXiv:2202.00512, Algorithm 2 (ddim); github.com/Hramchenko/diffusion_distiller (ancestral)."""
    alpha_t, sigma_t, alpha_mid, sigma_mid = (
        _per_image(column, levels) for column in (grid.alpha_t, grid.sigma_t, grid.alpha_mid, grid.sigma_mid)
    )
    x_1 = to_x_0(teacher(x_t, grid.timestep[levels]), x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
    x_1 = x_1.clamp(-1, 1) if clip_target else x_1
    eps_1 = to_eps(x_1, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind="x_0")
    x_mid = ddim_step(x_1, eps_1, alpha_s=alpha_mid, sigma_s=sigma_mid)
    x_2 = to_x_0(teacher(x_mid, grid.timestep_mid[levels]), x_mid, alpha_t=alpha_mid, sigma_t=sigma_mid, kind=prediction)
    x_2 = x_2.clamp(-1, 1) if clip_target else x_2
    match target:
        case "ddim":
            return torch.lerp(x_1, x_2, _per_image(grid.share, levels))
        case "ancestral":
            return x_2
        case _:
            assert_never(target)


def halving_loss(
    student: Denoiser,
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
) -> Float[Tensor, " b"]:
    """Loss per image on the student's levels floor(uniforms * n); the gradient flows through the student alone.

    x_0: clean images on the scale [-1, 1]. noise: with any offset already in it. grid: on the device of x_0.
    Source: Salimans & Ho 2022, arXiv:2202.00512, Algorithm 2; for the losses see `loss_weight`."""
    levels = draw_index(uniforms.to(x_0.device), len(grid))
    alpha_t, sigma_t = _per_image(grid.alpha_t, levels), _per_image(grid.sigma_t, levels)
    x_t = diffuse(x_0, noise, alpha_t=alpha_t, sigma_t=sigma_t)
    clean = halving_target(teacher, x_t, levels=levels, grid=grid, prediction=prediction, target=target, clip_target=clip_target)
    wanted = from_x_0(clean, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
    weight = loss_weight(grid.alpha_t[levels], grid.sigma_t[levels], prediction=prediction, loss=loss, min_snr_gamma=min_snr_gamma)
    return weight * squared_error(student(x_t, grid.timestep[levels]), wanted)


def _per_image(column: Float[Tensor, " n"], levels: Int64[Tensor, " b"]) -> Float[Tensor, "b 1 1 1"]:
    return column[levels].view(-1, 1, 1, 1)
