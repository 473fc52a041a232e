"""Decoded members to what a batch holds: pixels to a tensor, bytes to a caption or attributes."""

import json
from collections.abc import Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor

from data_shards.images import DecodeError


def images_tensor(pixels: Sequence[bytes], *, image_size: int) -> UInt8[Tensor, "b c h w"]:
    """Rows of `image_pixels` as one contiguous tensor, 0 .. 255."""
    rows = torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8).view(len(pixels), image_size, image_size, 3)
    images = torch.empty((len(pixels), 3, image_size, image_size), dtype=torch.uint8)
    return images.copy_(rows.permute(0, 3, 1, 2))


def caption_text(content: bytes) -> str:
    """A caption.

    Raises: DecodeError if it is not UTF-8.
    """
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise DecodeError(f"the caption is not UTF-8: {error.reason} at byte {error.start}") from None


def attribute_strings(content: bytes) -> dict[str, str]:
    """The "attributes" of a sample's JSON; empty if it has none.

    Raises: DecodeError if it is not a JSON object whose attributes are plain strings.
    """
    try:
        entries = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DecodeError(f"the .json is not JSON: {error}") from None
    attributes = entries.get("attributes", {}) if isinstance(entries, dict) else None
    if not isinstance(attributes, dict) or not all(isinstance(value, str) for value in attributes.values()):
        raise DecodeError("the .json is not an object whose attributes are strings")
    return attributes
