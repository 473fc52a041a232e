"""DDIM and ancestral sampling on any sub-grid of a noise schedule, equal to diffusers' schedulers."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, assert_never, final

import torch
from jaxtyping import Float, Float64
from torch import Generator, Tensor

from trainer.config_sections import Prediction, Sampler
from trainer.diffusion.parameterization import Denoiser, Scale, to_eps, to_x_0

Variance = Literal["fixed_small", "fixed_large"]


@final
@dataclass(frozen=True)
class SamplingGrid:
    """The noise levels of a sampling run, noisiest first, and the level at which its last step lands."""

    timesteps: tuple[int, ...]
    """Original timesteps, descending: what the network is conditioned on."""
    alpha_bar: tuple[float, ...]
    """alpha_bar at each of them."""
    final: float = 1.0
    """alpha_bar after the last step; 1 is a clean image."""


def sampling_grid(alpha_bar: Float64[Tensor, " T"], timesteps: Sequence[int]) -> SamplingGrid:
    """The grid of the given original timesteps, in any order.

    Raises: ValueError if one is given twice or is not in the table."""
    descending = tuple(sorted(timesteps, reverse=True))
    if not descending or len(set(descending)) < len(descending) or descending[0] >= len(alpha_bar) or descending[-1] < 0:
        raise ValueError(f"timesteps {list(timesteps)}: wanted different ones from 0 to {len(alpha_bar) - 1}, at least one")
    table: list[float] = alpha_bar.tolist()
    return SamplingGrid(timesteps=descending, alpha_bar=tuple(table[timestep] for timestep in descending))


def posterior_variance(alpha_bar_t: float, alpha_bar_s: float) -> float:
    """Variance of x_s given x_t and x_0, for a cleaner level s. Source: Ho et al. 2020, arXiv:2006.11239, equation 7."""
    return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)


def ddim_step(
    x_0: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    *,
    alpha_s: Scale,
    sigma_s: Scale,
    noise: Float[Tensor, "b c h w"] | None = None,
    noise_scale: float = 0.0,
) -> Float[Tensor, "b c h w"]:
    """x_s at the cleaner level s, from the predicted x_0 and eps; fresh noise of `noise_scale` replaces a part of eps.

    Source: Song et al. 2021, arXiv:2010.02502, equation 12."""
    if noise is None:
        return alpha_s * x_0 + sigma_s * eps
    return alpha_s * x_0 + (sigma_s**2 - noise_scale**2) ** 0.5 * eps + noise_scale * noise


def ancestral_step(
    x_0: Float[Tensor, "b c h w"],
    x_t: Float[Tensor, "b c h w"],
    *,
    alpha_bar_t: float,
    alpha_bar_s: float,
    variance: Variance = "fixed_small",
    noise: Float[Tensor, "b c h w"] | None = None,
) -> Float[Tensor, "b c h w"]:
    """A draw of x_s at the cleaner level s given x_t and the predicted x_0; its mean where no noise is given.

    variance: fixed_small is the posterior's, right for data without spread; fixed_large is beta, right for normal data.
    Source: Ho et al. 2020, arXiv:2006.11239, equations 6 and 7, section 3.2."""
    beta = 1 - alpha_bar_t / alpha_bar_s
    of_x_0 = math.sqrt(alpha_bar_s) * beta / (1 - alpha_bar_t)
    of_x_t = math.sqrt(alpha_bar_t / alpha_bar_s) * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    mean = of_x_0 * x_0 + of_x_t * x_t
    if noise is None:
        return mean
    return mean + math.sqrt(posterior_variance(alpha_bar_t, alpha_bar_s) if variance == "fixed_small" else beta) * noise


def sample(
    denoiser: Denoiser,
    x_T: Float[Tensor, "b c h w"],
    grid: SamplingGrid,
    *,
    prediction: Prediction,
    sampler: Sampler,
    eta: float = 0.0,
    variance: Variance = "fixed_small",
    clip: bool = True,
    generators: Sequence[Generator] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> Float[Tensor, "b c h w"]:
    """Images made from the noise x_T in one pass over the grid; with `clip` they span [-1, 1].

    clip: clips x_0 at every step and keeps the direction from the unclipped eps. eta: noise of DDIM, 0 none, 1 the posterior's.
    generators: one an image, for the noise of ancestral and of eta > 0, drawn at every step but the last.
    on_step: told how many steps are done.
    Raises: ValueError if noise is wanted and there is not one generator an image."""
    last = len(grid.timesteps) - 1
    stochastic = last > 0 and (sampler == "ancestral" or eta > 0)
    if stochastic and (generators is None or len(generators) != len(x_T)):
        given = "none" if generators is None else str(len(generators))
        raise ValueError(f"{sampler} sampling of {len(x_T)} images with eta={eta} draws noise: wanted {len(x_T)} generators, got {given}")
    timesteps = torch.tensor(grid.timesteps, dtype=torch.float32, device=x_T.device)
    with torch.inference_mode():
        x_t = x_T
        for k, (alpha_bar_t, alpha_bar_s) in enumerate(pairwise((*grid.alpha_bar, grid.final))):
            alpha_t, sigma_t = math.sqrt(alpha_bar_t), math.sqrt(1 - alpha_bar_t)
            output = denoiser(x_t, timesteps[k].expand(len(x_t))).to(x_t.dtype)
            x_0 = to_x_0(output, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
            x_0 = x_0.clamp(-1, 1) if clip else x_0
            noise = fresh_noise(generators, like=x_t) if generators and stochastic and k < last else None
            match sampler:
                case "ddim":
                    eps = to_eps(output, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=prediction)
                    alpha_s, sigma_s = math.sqrt(alpha_bar_s), math.sqrt(1 - alpha_bar_s)
                    noise_scale = eta * math.sqrt(posterior_variance(alpha_bar_t, alpha_bar_s))
                    x_t = ddim_step(x_0, eps, alpha_s=alpha_s, sigma_s=sigma_s, noise=noise, noise_scale=noise_scale)
                case "ancestral":
                    x_t = ancestral_step(x_0, x_t, alpha_bar_t=alpha_bar_t, alpha_bar_s=alpha_bar_s, variance=variance, noise=noise)
                case _:
                    assert_never(sampler)
            if on_step is not None:
                on_step(k + 1)
    # The copy is an ordinary tensor: one made in inference mode could not be changed in place later.
    return x_t.clone()


def fresh_noise(generators: Sequence[Generator], *, like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Standard normal noise, image i from generator i, in fp32 as diffusers draws it from a list of generators."""
    shape = (1, *like.shape[1:])
    return torch.cat([torch.randn(shape, generator=generator) for generator in generators]).to(like)


def draw_noise(seed: int, count: int, shape: tuple[int, int, int], *, start: int = 0) -> tuple[Float[Tensor, "b c h w"], list[Generator]]:
    """x_T of images start ... start + count - 1 of `shape` (c, h, w), and the generators for the noise of their later steps.

    Image i is the first draw, (1, c, h, w) in fp32, of a CPU generator seeded with seed + i, whichever images are drawn with it."""
    generators = [Generator("cpu").manual_seed(seed + image) for image in range(start, start + count)]
    return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators]), generators
