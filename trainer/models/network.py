"""What engines train: a module whose outputs carry `sample`, called as a plain function."""

from collections.abc import Callable

from torch import Tensor, nn

Network = Callable[..., Tensor]
"""(x_t, timestep, ...) -> prediction; what stands behind the two is the model's own, such as its conditioning."""


def network(model: nn.Module) -> Network:
    """The model as a plain function; timestep is the original one, as float."""
    return lambda *inputs: model(*inputs).sample
