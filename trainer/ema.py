"""Exponential moving average of weights."""


def ema_decay(step: int, *, decay: float, warmup: bool) -> float:
    """The share of the old average kept at the update after optimizer step `step` (from 0): a pure function, no counter to save.

    Source: the warm-up min(decay, (1 + n) / (10 + n)) is TensorFlow's ExponentialMovingAverage, n = step + 1 updates."""
    updates = step + 1
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay
