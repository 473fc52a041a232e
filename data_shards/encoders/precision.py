"""The precision in which frozen models run."""

from contextlib import AbstractContextManager

import torch

from data_shards.derive.request import Precision


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """bf16 for what bears it, weights staying fp32; or fp32 for all."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")
