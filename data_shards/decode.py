"""Bytes of a member to an image, a caption or attributes: an allow-list with limits, checked before anything is unpacked."""

import io
import json
import struct
import zlib
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import UInt8
from PIL import ImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

# Pillow's readers, called by extension: `Image.open` would try them one by one, 4 us of 30 for a 32 px PNG
READERS: Mapping[str, type[ImageFile.ImageFile]] = {
    "png": PngImageFile,
    "webp": WebPImageFile,
    "jpg": JpegImageFile,
    "jpeg": JpegImageFile,
}
# what Pillow raises on bytes that are no image of that format, or a damaged one
IMAGE_ERRORS = (OSError, SyntaxError, ValueError, IndexError, KeyError, TypeError, EOFError, struct.error, zlib.error, OverflowError)


class DecodeError(ValueError):
    """Bytes that are not what their extension says, or beyond a limit."""


def image_pixels(content: bytes, extension: str, *, image_size: int) -> bytes:
    """The image_size x image_size x 3 RGB bytes of an encoded image.

    The size in its header is compared before a pixel is unpacked, so a bomb costs nothing.
    Raises: DecodeError if it is not of its extension's format, not of this size, or damaged.
    """
    try:
        image = READERS[extension](io.BytesIO(content))
        if image.size != (image_size, image_size):
            raise DecodeError(f"the image is {image.width} x {image.height} pixels, the index says {image_size} x {image_size}")
        if image.mode == "RGB":
            return image.tobytes()  # loads it
        return image.convert("RGB").tobytes()
    except DecodeError:
        raise
    except IMAGE_ERRORS as error:
        raise DecodeError(f"the .{extension} can't be decoded: {error or type(error).__name__}") from None


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
