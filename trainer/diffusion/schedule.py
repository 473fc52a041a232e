"""Noise schedules as fp64 tables of alpha_bar, one entry per timestep, least noise first."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import assert_never

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from trainer.config_sections import (
    BaseNoiseSchedule,
    CosineClampedNoiseSchedule,
    CosineNoiseSchedule,
    GivenNoiseSchedule,
    LinearNoiseSchedule,
    NoiseScheduleConfig,
    ScaledLinearNoiseSchedule,
)

COSINE_OFFSET = 0.008
COSINE_MAX_BETA = 0.999
CLAMPED_ALPHA_BAR = (1e-5, 0.9999)
# What a scheduler's class means by a config without beta_schedule, where that is not linear.
_OWN_BETAS = {"UnCLIPScheduler": "squaredcos_cap_v2"}


def build_alpha_bar(noise_schedule: NoiseScheduleConfig) -> Float64[Tensor, " T"]:
    """The table of a recipe's noise schedule, on the CPU: values in (0, 1), non-increasing.

    Computed with Python's floats, so that its hash is the same under every version of torch and every vector width."""
    match noise_schedule:
        case LinearNoiseSchedule(steps=steps, beta_start=first, beta_end=last):
            return alpha_bar_of_betas(linear_betas(first, last, steps=steps))
        case ScaledLinearNoiseSchedule(steps=steps, beta_start=first, beta_end=last):
            return alpha_bar_of_betas(scaled_linear_betas(first, last, steps=steps))
        case CosineNoiseSchedule(steps=steps):
            return alpha_bar_of_betas(cosine_betas(steps))
        case CosineClampedNoiseSchedule(steps=steps):
            return clamped_cosine_alpha_bar(steps)
        case GivenNoiseSchedule(betas=betas):
            return alpha_bar_of_betas(betas)
        case BaseNoiseSchedule():
            raise ValueError("noise_schedule.kind=base: the levels are in the base's scheduler; a model from scratch has none")
        case _:
            assert_never(noise_schedule)


def linear_betas(first: float, last: float, *, steps: int) -> list[float]:
    """Betas in a straight line. Source: Ho et al. 2020, arXiv:2006.11239, section 4."""
    return [first + (last - first) * k / max(steps - 1, 1) for k in range(steps)]


def scaled_linear_betas(first: float, last: float, *, steps: int) -> list[float]:
    """Betas whose square roots lie in a straight line. Source: Rombach et al. 2022, arXiv:2112.10752, as in its code."""
    return [root * root for root in linear_betas(math.sqrt(first), math.sqrt(last), steps=steps)]


def cosine_signal(u: float) -> float:
    """alpha_bar at time u in [0, 1], not divided by its value at 0.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17, f(t)."""
    return math.cos((u + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2


def cosine_betas(steps: int) -> list[float]:
    """Betas of the squared cosine, at most 0.999: diffusers' squaredcos_cap_v2.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17 and the text after it."""
    return [min(1 - cosine_signal((k + 1) / steps) / cosine_signal(k / steps), COSINE_MAX_BETA) for k in range(steps)]


def clamped_cosine_alpha_bar(steps: int) -> Float64[Tensor, " T"]:
    """The squared cosine itself at u = (k + 1) / T, kept within [1e-5, 0.9999]; its noisiest entries may be equal.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17, f(t)."""
    low, high = CLAMPED_ALPHA_BAR
    return torch.tensor([min(max(cosine_signal((k + 1) / steps), low), high) for k in range(steps)], dtype=torch.float64)


def alpha_bar_of_betas(betas: Iterable[float]) -> Float64[Tensor, " T"]:
    """Products of 1 - beta up to and with each timestep; betas in (0, 1]. Source: Ho et al. 2020, arXiv:2006.11239, equation 4."""
    return torch.tensor(list(accumulate((1 - beta for beta in betas), mul)), dtype=torch.float64)


def respaced_betas(alpha_bar: Float64[Tensor, " T"], timesteps: Sequence[int]) -> list[float]:
    """Betas of a schedule that has only the given ascending timesteps: what a re-indexed stock scheduler takes as trained_betas.

    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 19."""
    levels = [1.0, *(float(alpha_bar[timestep]) for timestep in timesteps)]
    return [1 - noisier / cleaner for cleaner, noisier in pairwise(levels)]


def zero_terminal_snr(alpha_bar: Float64[Tensor, " T"]) -> Float64[Tensor, " T"]:
    """The table with its last entry exactly 0 and its first one kept: alpha shifted, then scaled. Wants a v or x_0 prediction.

    Raises: ValueError if its ends are equal, so that there is nothing to scale.
    Source: Lin et al. 2023, arXiv:2305.08891, Algorithm 1."""
    signal = alpha_bar.sqrt()
    first, last = signal[0], signal[-1]
    if not first > last:
        raise ValueError(
            f"the noise schedule starts with alpha {float(first)} and ends with {float(last)}, wanted one that falls; set more steps"
        )
    return ((signal - last) * (first / (first - last))).square()


def alpha_bar_of_scheduler(config: Mapping[str, object]) -> Float64[Tensor, " T"]:
    """The table of a diffusers scheduler_config.json, in fp64; what it does not say is as DDPMScheduler, or UnCLIPScheduler, has it.

    Zero terminal SNR, if the config asks for it, is in the table. Raises: ValueError naming the entry that is not understood."""
    trained = config.get("trained_betas")
    steps = _entry(config, "num_train_timesteps", 1000.0)
    first, last = _entry(config, "beta_start", 0.0001), _entry(config, "beta_end", 0.02)
    match config.get("beta_schedule", _OWN_BETAS.get(str(config.get("_class_name")), "linear")):
        case _ if isinstance(trained, Sequence) and not isinstance(trained, str):
            betas = [_number(beta, f"trained_betas[{at}]") for at, beta in enumerate(trained)]
        case _ if trained is not None:
            raise ValueError(f"scheduler_config.json: trained_betas is {trained!r:.60}, wanted a list of numbers or null")
        case "linear":
            betas = linear_betas(first, last, steps=int(steps))
        case "scaled_linear":
            betas = scaled_linear_betas(first, last, steps=int(steps))
        case "squaredcos_cap_v2":
            betas = cosine_betas(int(steps))
        case other:
            raise ValueError(
                f"scheduler_config.json: beta_schedule is {other!r:.60}, wanted linear, scaled_linear or squaredcos_cap_v2; "
                "or give trained_betas"
            )
    if not betas or not all(0 <= beta <= 1 for beta in betas):
        raise ValueError("scheduler_config.json: its betas must lie in [0, 1], and be one at least; give another base or trained_betas")
    table = alpha_bar_of_betas(betas)
    return zero_terminal_snr(table) if config.get("rescale_betas_zero_snr") else table


def _entry(config: Mapping[str, object], name: str, default: float) -> float:
    return _number(config.get(name, default), name)


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"scheduler_config.json: {name} is {value!r:.60}, wanted a number")
    return float(value)


def alpha_sigma(alpha_bar: Float[Tensor, "*levels"]) -> tuple[Float[Tensor, "*levels"], Float[Tensor, "*levels"]]:
    """Signal and noise scale, alpha_t and sigma_t, in [0, 1]; their squares add up to 1."""
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def log_snr(alpha_bar: Float[Tensor, "*levels"]) -> Float[Tensor, "*levels"]:
    """Natural logarithm of the signal-to-noise ratio alpha^2 / sigma^2. Source: Kingma et al. 2021, arXiv:2107.00630, equation 3."""
    return alpha_bar.log() - torch.log1p(-alpha_bar)


def draw_index(uniforms: Float[Tensor, " b"], count: int) -> Int64[Tensor, " b"]:
    """Indices floor(uniforms * count) below `count`, equally likely for uniforms in [0, 1), whose product never rounds up to it."""
    return (uniforms * count).long()


def alpha_bar_sha256(alpha_bar: Float64[Tensor, " T"]) -> str:
    """Hex digest of the whole table as little-endian fp64 bytes."""
    return hashlib.sha256(alpha_bar.cpu().double().numpy().astype("<f8").tobytes()).hexdigest()
