"""Exponential moving average of weights."""

import torch
from torch import Tensor


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """The share of the old average kept at the update after optimizer step `step` (from 0): a pure function, no counter to save.

    Source: the warm-up min(decay, (1 + n) / (10 + n)) is TensorFlow's ExponentialMovingAverage, n = step + 1 updates."""
    updates = step + 1
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


def update_ema(average: Tensor, weights: Tensor, *, decay: float) -> None:
    """Move `average` towards `weights` by 1 - decay, in place; both fp32, one flat tensor each."""
    with torch.no_grad():
        average.lerp_(weights, 1 - decay)
