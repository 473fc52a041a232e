"""Tensors as members of shards: plain numbers in numpy's own format, written without any pickle."""

import io

import numpy as np
from torch import Tensor

from data_shards.derive.request import StoredType

_TYPES = {"fp16": np.float16, "fp32": np.float32}


def npy_bytes(tensor: Tensor, dtype: StoredType) -> bytes:
    """A tensor as a .npy file of version 1.0, in C order.

    Raises: ValueError if a value is not finite in this type."""
    with np.errstate(over="ignore"):  # what overflows is said below
        values = np.ascontiguousarray(tensor.detach().float().cpu().numpy(), dtype=_TYPES[dtype])
    if not np.isfinite(values).all():
        raise ValueError(f"an encoder gives values that are not finite in {dtype}; give --dtype fp32, or --precision fp32")
    return _written(values)


def mask_bytes(mask: Tensor) -> bytes:
    """Which tokens count, as a .npy file of bytes 0 and 1."""
    return _written(np.ascontiguousarray(mask.cpu().numpy(), dtype=np.uint8))


def _written(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, values, version=(1, 0), allow_pickle=False)
    return file.getvalue()
