"""Dropout that depends on the draw alone, not on how the activations lie in memory."""

from typing import final

import torch
from torch import Tensor, nn


@final
class Dropout(nn.Module):
    """nn.Dropout whose mask is drawn in logical order: engines that lay out weights differently drop the same activations.

    Source: Srivastava et al. 2014, jmlr.org/papers/v15/srivastava14a.html, in its inverted form."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, activations: Tensor) -> Tensor:
        """Zero each activation with the probability and scale the others, while training."""
        if not self.training or self.probability == 0:
            return activations
        kept = torch.empty(activations.shape, dtype=activations.dtype, device=activations.device).bernoulli_(1 - self.probability)
        return activations * kept.div_(1 - self.probability)


def use_logical_dropout(model: nn.Module) -> None:
    """Put `Dropout` in the place of every nn.Dropout of a model."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p).train(child.training))
