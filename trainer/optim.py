"""Optimizers and learning-rate schedules; the rate is a pure function of the step."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config import LRScheduleConfig, OptimConfig
from trainer.optim_8bit import AdamW8bit


def build_optimizer(optim: OptimConfig, parameters: Sequence[Tensor]) -> torch.optim.AdamW | torch.optim.Adam | AdamW8bit:
    """Adam or AdamW in one fused kernel, or AdamW with moments in 8 bits; the loop sets the rate before each step.

    Source: Kingma & Ba 2014, arXiv:1412.6980; Loshchilov & Hutter 2017, arXiv:1711.05101; Dettmers et al. 2021, arXiv:2110.02861."""
    if optim.kind == "adamw_8bit":
        return AdamW8bit(parameters, lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[optim.kind]
    return kind(list(parameters), lr=optim.learning_rate, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True)


def learning_rate(step: int, *, peak: float, total_steps: int, schedule: LRScheduleConfig) -> float:
    """The rate of optimizer step `step` (from 0), 0 < rate <= peak: linear warm-up, then the schedule's own course."""
    if step < schedule.warmup_steps:
        return peak * (step + 1) / schedule.warmup_steps
    match schedule.kind:
        case "constant":
            return peak
        case "step_decay":
            return peak * schedule.factor ** (step // schedule.every_steps)
        case "linear":
            return peak * (1 - _progress(step, total_steps, schedule.warmup_steps))
        case "cosine":
            return peak * 0.5 * (1 + math.cos(math.pi * _progress(step, total_steps, schedule.warmup_steps)))


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Share of the steps after warm-up that are over, in [0, 1): the last step's rate is above 0."""
    return (step - warmup_steps) / max(1, total_steps - warmup_steps)
