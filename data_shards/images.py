"""Bytes to pixels and back: one format an extension, sizes compared before anything is unpacked; imports no torch."""

import io
import struct
import zlib
from collections.abc import Mapping

from PIL import Image, ImageFile, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile

from data_shards.config import DEFAULT_BACKGROUND, MAX_IMAGE_PIXELS, ImageFormat
from data_shards.image_header import DecodeError, check_scans, image_header_size

# Pillow's readers, called by extension: `Image.open` would try them one by one, 4 us of 30 for a 32 px PNG
READERS: Mapping[str, type[ImageFile.ImageFile]] = {
    "png": PngImageFile,
    "webp": WebPImageFile,
    "jpg": JpegImageFile,
    "jpeg": JpegImageFile,
}
WHOLE_BYTES = 2**22  # Pillow hands the bytes to a decoder in pieces of 2**16 otherwise: of a WebP's pixels 0.07 ms of 0.7
SMALL_IMAGE_BYTES = 2**20  # up to this size a PNG has too few chunks, a JPEG too few segments, to cost a reader a second
# what Pillow raises on bytes that are no image of that format, or a damaged one
IMAGE_ERRORS = (
    Image.DecompressionBombError,
    OSError,
    SyntaxError,
    ValueError,
    IndexError,
    KeyError,
    TypeError,
    EOFError,
    struct.error,
    zlib.error,
    OverflowError,
)


def image_pixels(content: bytes, extension: str, *, size: tuple[int, int]) -> bytes:
    """The RGB bytes, row by row, of an encoded image of `size` = (width, height).

    The size in its header is compared before a pixel is unpacked, so a bomb costs nothing.
    Raises: DecodeError if it is not of its extension's format, not of this size, or damaged.
    """
    return scaled_pixels(content, extension, size=size, least=None)[0]


def scaled_pixels(content: bytes, extension: str, *, size: tuple[int, int], least: tuple[int, int] | None) -> tuple[bytes, tuple[int, int]]:
    """RGB bytes, upright, and (width, height) of an encoded image of `size`; a JPEG may come at 1/2, 1/4 or 1/8 of it.

    least: no side becomes smaller than twice this by that. Raises: DecodeError as image_pixels.
    """
    try:
        _check_cost(content, extension.rpartition(".")[2], size)
        image = READERS[extension.rpartition(".")[2]](io.BytesIO(content))
        image.decodermaxblock = WHOLE_BYTES
        if image.size != size:
            raise DecodeError(f"the image is {image.width} x {image.height} pixels, the index says {size[0]} x {size[1]}")
        if least is not None:
            image.draft("RGB", (2 * least[0], 2 * least[1]))
        if image.mode != "RGB" or (least is not None and "exif" in image.info):
            drawn = plain_image(image)
            return drawn.tobytes(), drawn.size
        return image.tobytes(), image.size  # loads it
    except DecodeError:
        raise
    except IMAGE_ERRORS as error:
        raise DecodeError(f"the .{extension} can't be decoded: {error or type(error).__name__}") from None


def _check_cost(content: bytes, extension: str, size: tuple[int, int]) -> None:
    """Refuses what makes Pillow work or take memory before it tells the size: libwebp lays out the canvas, scans and chunks are endless.

    Raises: DecodeError. Takes 0.3 us for a small PNG or JPEG.
    """
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise DecodeError(f"the index says {size[0]} x {size[1]} pixels, at most {MAX_IMAGE_PIXELS} pixels are decoded")
    if extension == "webp" or len(content) > SMALL_IMAGE_BYTES:
        image_header_size(content, extension)
    elif extension in ("jpg", "jpeg"):
        check_scans(content)


def plain_image(image: Image.Image) -> Image.Image:
    """The same picture upright, in RGB, on white where it is transparent."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "RGB":
        return upright
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    drawn = upright.convert("RGBA")
    plain = Image.new("RGB", drawn.size, DEFAULT_BACKGROUND)
    plain.paste(drawn, mask=drawn)
    return plain


def eight_bits(image: Image.Image) -> Image.Image:
    """A 16-bit grey image at 8 bits; Pillow's own conversion would turn all above 255 white."""
    if not image.mode.startswith("I"):
        return image
    return image.point(lambda value: value * (1 / 256)).convert("L")


def mask_image(image: Image.Image) -> Image.Image:
    """A mask in grey with nothing between: 255 where it is 128 or more, which is to be painted, and 0 elsewhere.

    Raises: ValueError if it is transparent somewhere, which some mean by painted and some by kept, or holds labels 0 and 1.
    """
    if image.has_transparency_data and image.convert("RGBA").getchannel("A").getextrema() != (255, 255):
        raise ValueError("it is partly transparent, wanted white where it is to be painted, on black")
    grey = eight_bits(image).convert("L")
    if grey.getextrema()[1] == 1:
        raise ValueError("its brightest grey is 1 of 255, wanted 255 where it is to be painted")
    return grey.point([0] * 128 + [255] * 128)


def mask_pixels(content: bytes, *, size: tuple[int, int]) -> bytes:
    """The bytes, row by row, of an encoded mask as `mask_image` makes it; size: (width, height) of its image.

    Raises: DecodeError if it is no PNG, not of this size, damaged, or can't be told from its opposite.
    """
    try:
        _check_cost(content, "png", size)
        image = PngImageFile(io.BytesIO(content))
        if image.size != size:
            raise DecodeError(f"the mask is {image.width} x {image.height} pixels, its image {size[0]} x {size[1]}")
        return mask_image(image).tobytes()
    except DecodeError:
        raise
    except IMAGE_ERRORS as error:
        raise DecodeError(f"the .mask.png can't be used: {error or type(error).__name__}") from None


def encode_image(image: Image.Image, image_format: ImageFormat) -> bytes:
    """Bytes of an RGB image: png and webp without loss, jpg at quality 95 without chroma subsampling."""
    file = io.BytesIO()
    if image_format == "png":
        image.save(file, format="PNG")
    elif image_format == "webp":
        image.save(file, format="WEBP", lossless=True, quality=100, method=6)
    else:
        image.save(file, format="JPEG", quality=95, subsampling=0)
    return file.getvalue()
