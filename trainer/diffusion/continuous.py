"""Noise as a function of continuous time, as Wuerstchen's prior is trained: no table of levels."""

import math

from jaxtyping import Float64
from torch import Tensor

from trainer.diffusion.schedule import COSINE_OFFSET

CONTINUOUS_ALPHA_BAR = (1e-4, 0.9999)


def continuous_alpha_bar(t: Float64[Tensor, " b"], *, scaler: float = 1.0, offset: float = COSINE_OFFSET) -> Float64[Tensor, " b"]:
    """The squared cosine at times t in [0, 1], 0 clean, divided by its value at 0 and kept within [1e-4, 0.9999].

    scaler, offset: `scaler` and `s` of DDPMWuerstchenScheduler; a scaler other than 1 moves all times towards noise.
    Source: Nichol & Dhariwal 2021, arXiv:2102.09672, equation 17; Pernias et al. 2023, arXiv:2306.00637, section 3, and its code."""
    if scaler > 1:
        t = 1 - (1 - t) ** scaler
    elif scaler < 1:
        t = t**scaler
    low, high = CONTINUOUS_ALPHA_BAR
    angle = (t + offset) * (math.pi / 2 / (1 + offset))
    return (angle.cos().square() / math.cos(offset / (1 + offset) * math.pi / 2) ** 2).clamp(low, high)
