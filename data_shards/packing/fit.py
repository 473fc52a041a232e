"""Encoded bytes to the picture that is packed: within our limits, upright, cropped, scaled; imports no torch."""

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, final

from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from data_shards.config import IMAGE_FORMATS, MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, ImageFormat
from data_shards.images import IMAGE_ERRORS, eight_bits, encode_image, mask_image, plain_image

PackFormat = Literal["png", "webp", "jpg", "keep"]
Crop = Literal["centre", "none"]
# what an image that can't be used raises, from its header to its last pixel
UNFIT = (Image.DecompressionBombWarning, *IMAGE_ERRORS)
# a JPEG is decoded at the smallest of 1, 1/2, 1/4, 1/8 that is 3 x what is wanted: leaves Lanczos enough to work on
DRAFT_FACTOR = 3
_EXIF_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)  # orientations that swap width and height
# how Pillow names a file -> how we would write it again; MPO is a JPEG with more pictures behind the first
_OWN_FORMATS: dict[str, ImageFormat] = {"PNG": "png", "WEBP": "webp", "JPEG": "jpg", "MPO": "jpg"}


@final
@dataclass(frozen=True)
class Fit:
    """What images are brought to.

    size: side in pixels, None for each image's own; max_size: with no size, pixels that the shorter side has at most; crop: to the
    central square, or not at all (only without a size); image_format: keep leaves a file's own bytes where nothing needs a change.
    Raises: ValueError where these do not go together.
    """

    size: int | None
    image_format: PackFormat = "png"
    crop: Crop = "centre"
    max_size: int | None = None

    def __post_init__(self) -> None:
        if self.size is not None and self.size**2 > MAX_IMAGE_PIXELS:
            raise ValueError(f"size={self.size}: images have at most {int(MAX_IMAGE_PIXELS**0.5)} pixels a side; set a smaller size")
        if self.size is not None and self.crop == "none":
            raise ValueError(f"crop=none keeps the shape of images, but size={self.size} asks for squares; set no size, or crop=centre")
        if self.size is not None and self.max_size is not None:
            raise ValueError(f"max_size={self.max_size} is for images of their own size, but size={self.size} is set; remove one")
        if self.size is not None and self.image_format == "keep":
            raise ValueError(f"image_format=keep keeps files as they are, but size={self.size} is set; set png, webp or jpg, or no size")
        if self.max_size is not None and self.max_size < 1:
            raise ValueError(f"max_size={self.max_size} must be at least 1")


@final
@dataclass(frozen=True)
class Fitted:
    """An image as it is packed: its member's extension and bytes, and its RGB pixels."""

    extension: ImageFormat
    content: bytes
    pixels: Image.Image


@contextmanager
def image_warnings() -> Iterator[None]:
    """Makes Pillow's warning of a bomb an error, and drops its other ones: a damaged EXIF block does not spoil an image."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


def open_image(content: bytes) -> ImageFile.ImageFile:
    """An image whose header was read, not its pixels; to be called under image_warnings().

    Raises: one of UNFIT, saying what is wrong, if it is too large, of another format, or moves.
    """
    if len(content) > MAX_IMAGE_BYTES:
        raise ValueError(f"{len(content)} bytes, at most {MAX_IMAGE_BYTES} are allowed")
    return _opened(io.BytesIO(content))


def header_fault(path: Path) -> str | None:
    """Why an image file can't be packed, from its size and header alone. Raises: OSError if it can't be read."""
    size_bytes = path.stat().st_size
    if size_bytes > MAX_IMAGE_BYTES:
        return f"{size_bytes} bytes, at most {MAX_IMAGE_BYTES} are allowed"
    with path.open("rb") as file, image_warnings():
        try:
            _opened(file)
        except UNFIT as error:
            return str(error) or type(error).__name__
    return None


def _opened(file: BinaryIO) -> ImageFile.ImageFile:
    try:
        image = Image.open(file, formats=sorted(set(IMAGE_FORMATS.values())))
    except UnidentifiedImageError:
        raise ValueError("not a JPEG, PNG or WebP image") from None
    if image.width * image.height > MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, at most {MAX_IMAGE_PIXELS} are allowed")
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise ValueError("animated, wanted a still image")
    return image


def fit_image(image: ImageFile.ImageFile, fit: Fit, content: bytes) -> Fitted:
    """An opened image, decoded and brought to what is wanted; content: the bytes that it was opened from.

    Raises: one of UNFIT if it can't be decoded.
    """
    own_format, mode, transparent = image.format, image.mode, image.has_transparency_data
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    size = image.size
    pixels = _fitted_pixels(image, fit)
    plain = own_format != "MPO" and mode in ("RGB", "L") and not transparent and turned == 1
    own = _OWN_FORMATS[own_format or ""]
    if fit.image_format == "keep" and plain and pixels.size == size:
        return Fitted(own, content, pixels)
    extension = own if fit.image_format == "keep" else fit.image_format
    return Fitted(extension, encode_image(pixels, extension), pixels)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) of an opened image once it is turned upright."""
    turned = image.getexif().get(_EXIF_ORIENTATION, 1) if "exif" in image.info else 1
    return (image.height, image.width) if turned in _ON_ITS_SIDE else image.size


def fit_mask(content: bytes, fit: Fit, *, image_size: tuple[int, int]) -> bytes:
    """A mask as a black and white PNG, cropped and scaled like its image, which was upright of this size.

    Raises: one of UNFIT if it can't be decoded, is of another size, or can't be told from its opposite.
    """
    with open_image(content) as image:
        upright = ImageOps.exif_transpose(image)
        if upright.size != image_size:
            raise ValueError(
                f"its mask is {upright.width} x {upright.height} pixels, wanted {image_size[0]} x {image_size[1]} as the image"
            )
        file = io.BytesIO()
        try:
            _brought(mask_image(upright), image_size, fit, Image.Resampling.NEAREST).save(file, format="PNG")
        except ValueError as error:
            raise ValueError(f"its mask: {error}") from None
    return file.getvalue()


def fit_drawn(image: Image.Image, fit: Fit) -> Fitted:
    """An RGB image that a source drew at the wanted size."""
    extension: ImageFormat = "png" if fit.image_format == "keep" else fit.image_format
    return Fitted(extension, encode_image(image, extension), image)


def pixels_sha256(image: Image.Image) -> str:
    """sha256 of an RGB image's size and pixels."""
    digest = hashlib.sha256(f"{image.width} x {image.height}\n".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def _fitted_pixels(image: ImageFile.ImageFile, fit: Fit) -> Image.Image:
    """Upright RGB pixels, cropped and scaled."""
    size, side = image.size, _side(image.size, fit)
    image.draft("RGB", (DRAFT_FACTOR * side, DRAFT_FACTOR * side))
    return _brought(plain_image(eight_bits(image)), size, fit, Image.Resampling.LANCZOS)


def _side(size: tuple[int, int], fit: Fit) -> int:
    """Of the shorter side, in pixels, what it is brought to."""
    return fit.size or min(*size, fit.max_size or min(size))


def _brought(upright: Image.Image, size: tuple[int, int], fit: Fit, resampling: Image.Resampling) -> Image.Image:
    """An upright picture cropped and scaled; size: of the image before it was turned or drafted."""
    side = _side(size, fit)
    if fit.crop == "centre":
        square = min(upright.size)
        left, top = (upright.width - square) // 2, (upright.height - square) // 2
        upright = upright.crop((left, top, left + square, top + square))
        wanted = (side, side)
    else:
        other = max(1, round(max(size) * side / min(size)))
        wanted = (side, other) if upright.width <= upright.height else (other, side)
    return upright if upright.size == wanted else upright.resize(wanted, resampling, reducing_gap=3.0)
