"""What engines train: a module whose outputs carry `sample`, called as a plain function."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Network = Callable[..., Tensor]
"""(x_t, timestep, ...) -> prediction; what stands behind the two is the model's own, such as its conditioning."""


def network(model: nn.Module) -> Network:
    """The model as a plain function; timestep is the original one, as float."""
    return lambda *inputs: model(*inputs).sample


def in_format(predict: Network, memory_format: str) -> Network:
    """The same function of x_t laid out so, whose format convolutions with contiguous weights follow."""
    if memory_format == "contiguous":
        return predict
    return lambda x_t, *others: predict(x_t.contiguous(memory_format=torch.channels_last), *others)
