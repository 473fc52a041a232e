"""The type of activations: torch's autocast around forwards, the same on every engine."""

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from data_shards import ranks
from trainer.models.network import Network

_TYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def lower_type(precision: str) -> torch.dtype | None:
    """The type of bf16's or fp16's activations; None for fp32."""
    return _TYPES[precision]


def autocast(precision: str) -> torch.autocast:
    """The context for forwards on this rank's device; backwards follow by themselves."""
    dtype = lower_type(precision)
    return torch.autocast(ranks.device().type, dtype or torch.bfloat16, enabled=dtype is not None)


def evaluation(module: nn.Module, predict: Network, precision: str) -> Network:
    """A network that is being trained as a function without gradient: in evaluation mode while it computes; the output is fp32."""

    def evaluate(*inputs: object) -> Tensor:
        module.eval()
        # Weights that a sharded engine gathers in inference mode could not take part in training later.
        with torch.inference_mode(False), torch.no_grad(), autocast(precision):
            prediction = predict(*tree_map_only(Tensor, Tensor.clone, inputs))
        module.train()
        return tree_map_only(Tensor, Tensor.float, prediction)

    return evaluate


def check_precision(precision: str) -> None:
    """Try the precision on this rank's device with one small convolution, forwards and backwards.

    Raises: ValueError if the device cannot."""
    if precision == "fp32":
        return
    device = ranks.device()
    layer = torch.nn.Conv2d(4, 4, 3, device=device)
    # The weights are drawn from the default generator, but the recipe's own are seeded after this.
    try:
        with autocast(precision):
            output = layer(torch.ones(1, 4, 8, 8, device=device))
        output.float().sum().backward()
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"engine.precision={precision}: {device} cannot compute in it ({reason}); set engine.precision=fp32") from error
