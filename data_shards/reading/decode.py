"""Decoded members to what a batch holds: pixels to a tensor, bytes to a caption or attributes."""

import json
import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.nn.functional import interpolate

from data_shards.images import DecodeError
from data_shards.npy_header import npy_type_and_shape

_NUMPY_TYPES = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64, "i4": torch.int32, "i8": torch.int64, "u1": torch.uint8}


def images_tensor(
    pixels: Iterable[bytes], count: int, *, size: tuple[int, int], memory: UInt8[Tensor, " n"] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """`count` rows of `image_pixels` of one size (width, height), 0 .. 255; channels last in memory, as they were decoded.

    Each is put into its place as soon as it comes. memory: where they are put, by default into memory of their own.
    """
    # One image at a time stays in the core's cache, and no fresh pages are asked of the system for all of them:
    # that alone took 1 ms an image of 512 pixels, decoding it 1.4 (AMD EPYC)
    width, height = size
    row_bytes = 3 * width * height
    rows = torch.empty(count * row_bytes, dtype=torch.uint8) if memory is None else memory[: count * row_bytes]
    written = rows.numpy().data
    for row, content in enumerate(pixels):
        written[row * row_bytes : (row + 1) * row_bytes] = content
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


def fitted_images(
    decoded: Sequence[tuple[bytes, tuple[int, int]]], *, size: tuple[int, int], memory: UInt8[Tensor, " n"] | None = None
) -> UInt8[Tensor, "b c h w"]:
    """Images of several sizes brought to one, each by itself; the same bytes whatever stands beside it. memory: as images_tensor."""
    sizes = [stored for _, stored in decoded]
    if len(set(sizes)) == 1:
        images = fitted(images_tensor((pixels for pixels, _ in decoded), len(decoded), size=sizes[0]), size=size)
    else:
        images = torch.cat([fitted(images_tensor([pixels], 1, size=stored), size=size) for pixels, stored in decoded])
    if memory is None:
        return images
    placed = memory[: images.numel()].view(len(decoded), size[1], size[0], 3).permute(0, 3, 1, 2)
    return placed.copy_(images)


def fitted(images: UInt8[Tensor, "b c h w"], *, size: tuple[int, int]) -> UInt8[Tensor, "b c s t"]:
    """Images scaled (bicubic, antialiased) until they just cover `size` = (width, height), their centre cut out."""
    # torch's uint8 kernel on channels-last images takes a tenth of Pillow's time: 0.015 ms from 128 to 64 pixels (AMD EPYC)
    covering = _covering((images.shape[3], images.shape[2]), size)
    if covering != images.shape[2:]:
        images = interpolate(images, covering, mode="bicubic", antialias=True)
    return _centre(images, size).contiguous(memory_format=torch.channels_last)


def fitted_masks(decoded: Sequence[tuple[bytes, tuple[int, int]]], *, size: tuple[int, int]) -> UInt8[Tensor, "b 1 h w"]:
    """Rows of `mask_pixels` and their (width, height) brought to one size where `fitted` brings their images; 1: to be painted, 0: kept."""
    masks = []
    for content, (stored_width, stored_height) in decoded:
        mask = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(1, 1, stored_height, stored_width) >> 7
        covering = _covering((stored_width, stored_height), size)
        if covering != (stored_height, stored_width):
            mask = interpolate(mask, covering, mode="nearest-exact")
        masks.append(_centre(mask, size))
    return torch.cat(masks)


def _covering(stored: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """(height, width) at which an image just covers `size`; the arguments are (width, height)."""
    (stored_width, stored_height), (width, height) = stored, size
    # of the two ratios the larger one; compared and rounded in whole numbers, so that every machine agrees
    if width * stored_height >= height * stored_width:
        return max(height, (2 * stored_height * width + stored_width) // (2 * stored_width)), width
    return height, max(width, (2 * stored_width * height + stored_height) // (2 * stored_height))


def _centre(images: UInt8[Tensor, "b c h w"], size: tuple[int, int]) -> UInt8[Tensor, "b c s t"]:
    width, height = size
    top, left = (images.shape[2] - height) // 2, (images.shape[3] - width) // 2
    return images[:, :, top : top + height, left : left + width]


def tensor_of(content: bytes) -> Tensor:
    """The numbers of a .npy member.

    Raises: DecodeError if it holds anything but plain numbers in C order, or not as many as it says.
    """
    kind, shape = npy_type_and_shape(content)
    dtype = _NUMPY_TYPES.get(kind[1:])
    if dtype is None:
        raise DecodeError(f"the .npy holds numbers of type {kind}, wanted one of {', '.join(_NUMPY_TYPES)}")
    count = math.prod(shape)
    data = bytearray(content[len(content) - count * dtype.itemsize :])
    return torch.frombuffer(data, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)


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
