"""The precision in which frozen models run."""

from contextlib import AbstractContextManager

import torch
from torch import nn

from data_shards.derive.request import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """bf16 for what bears it, weights staying as they are held; or fp32 for all."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def hold_in_bf16(module: nn.Module, precision: Precision) -> None:
    """Keep the weights of linear and convolution layers in bf16, half the memory: what autocast makes of them at each call anyway.

    All others stay fp32, so that the numbers that come out are the same. Raises: ValueError if the precision is fp32."""
    if precision != "bf16":
        raise ValueError(f"weights held in bf16 do not serve precision {precision}; run the encoder in bf16, or hold its weights in fp32")
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d):
            layer.to(torch.bfloat16)
