"""Images as they are packed: within limits, upright, still, cropped or not, and as they were where nothing needs a change."""

import io
import random
import struct
import zlib

import pytest
from PIL import Image

from data_shards.images import image_pixels
from data_shards.packing.fit import UNFIT, Fit, Fitted, fit_image, image_warnings, open_image, pixels_sha256

ORIENTATION = 0x0112


def encoded(image: Image.Image, name: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, name, **options)
    return file.getvalue()


def photo(width: int, height: int) -> Image.Image:
    """Smooth noise, as a photograph has it."""
    small = Image.frombytes("RGB", (8, 8), random.Random(0).randbytes(192))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def fitted(content: bytes, fit: Fit) -> Fitted:
    with image_warnings():
        return fit_image(open_image(content), fit, content)


def pixels(one: Fitted) -> bytes:
    return image_pixels(one.content, one.extension, size=one.pixels.size)


def difference(one: bytes, other: bytes) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


OWN = Fit(None, crop="none")
KEEP = Fit(None, "keep", "none")


def test_an_image_of_its_own_size_keeps_every_pixel() -> None:
    image = photo(61, 40)
    for name in ("PNG", "WEBP"):
        one = fitted(encoded(image, name, lossless=True), OWN)
        assert (*one.pixels.size, one.extension) == (61, 40, "png") and pixels(one) == image.tobytes()


@pytest.mark.parametrize(
    ("size", "expected"), [((200, 100), (80, 40)), ((90, 400), (40, 178)), ((30, 300), (30, 300)), ((40, 41), (40, 41))]
)
def test_the_shorter_side_is_at_most_max_size_and_the_shape_stays(size: tuple[int, int], expected: tuple[int, int]) -> None:
    one = fitted(encoded(photo(*size), "PNG"), Fit(None, crop="none", max_size=40))
    assert one.pixels.size == expected
    assert fitted(encoded(photo(*size), "JPEG"), Fit(None, crop="none", max_size=40)).pixels.size == expected


def test_a_crop_without_a_size_is_the_whole_central_square() -> None:
    image = photo(90, 30)
    assert pixels(fitted(encoded(image, "PNG"), Fit(None))) == image.crop((30, 0, 60, 30)).tobytes()


def test_a_jpeg_that_is_decoded_smaller_looks_as_the_whole_one_does() -> None:
    content = encoded(photo(900, 700), "JPEG", quality=95)
    with Image.open(io.BytesIO(content)) as image:
        whole = image.crop((100, 0, 800, 700)).resize((64, 64), Image.Resampling.LANCZOS).tobytes()
    assert difference(pixels(fitted(content, Fit(64))), whole) < 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_upright(orientation: int) -> None:
    upright = photo(48, 32)
    undo = {
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = upright
    for step in undo.get(orientation, []):
        stored = stored.transpose(step)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    one = fitted(encoded(stored, "JPEG", exif=exif, quality=100, subsampling=0), OWN)
    assert one.pixels.size == (48, 32) and difference(pixels(one), upright.tobytes()) < 2


def test_keep_leaves_the_bytes_of_files_that_need_no_change() -> None:
    for name, extension in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        for mode in ("RGB", "L") if name != "WEBP" else ("RGB",):
            content = encoded(photo(50, 30).convert(mode), name)
            one = fitted(content, KEEP)
            assert one.content is content and one.extension == extension and pixels(one)


def test_keep_writes_anew_what_must_change_in_its_own_format() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = encoded(photo(50, 30), "JPEG", exif=exif)
    one = fitted(turned, KEEP)
    assert (one.extension, *one.pixels.size) == ("jpg", 30, 50) and one.content != turned
    exif[ORIENTATION] = 3  # upside down: of the same size
    assert fitted(upside := encoded(photo(50, 30), "JPEG", exif=exif), KEEP).content != upside
    clear = encoded(photo(50, 30).convert("RGBA"), "PNG")
    assert fitted(clear, KEEP).content != clear
    large = encoded(photo(50, 30), "WEBP")
    one = fitted(large, Fit(None, "keep", "none", max_size=15))
    assert (one.extension, *one.pixels.size) == ("webp", 25, 15)
    ink = encoded(photo(50, 30).convert("CMYK"), "JPEG")
    assert fitted(ink, KEEP).content != ink


def test_sixteen_bit_grey_is_not_turned_white() -> None:
    content = encoded(Image.new("I;16", (8, 8), 0x8080), "PNG")
    assert set(pixels(fitted(content, OWN))) == {0x80}


def test_formats_in_and_out() -> None:
    content = encoded(photo(40, 40), "PNG")
    for name in ("png", "webp", "jpg"):
        one = fitted(content, Fit(20, name))
        assert one.extension == name and one.pixels.size == (20, 20)
    assert pixels(fitted(content, Fit(20, "png"))) == pixels(fitted(content, Fit(20, "webp")))
    assert pixels_sha256(fitted(content, Fit(20, "png")).pixels) == pixels_sha256(fitted(content, Fit(20, "jpg")).pixels)


def bomb(side: int) -> bytes:
    """A PNG whose header says side x side pixels."""
    content = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a JPEG, PNG or WebP image"),
        (b"GIF89a" + bytes(40), "not a JPEG, PNG or WebP image"),
        (encoded(photo(20, 20), "GIF"), "not a JPEG, PNG or WebP image"),
        (encoded(photo(20, 20), "TIFF"), "not a JPEG, PNG or WebP image"),
        (encoded(photo(20, 20), "PNG")[:-60], "truncated"),
        (encoded(photo(60, 60), "JPEG")[:-300], "truncated"),
        (bomb(30_000), "decompression bomb"),
        (bomb(12_000), "decompression bomb"),  # of which Pillow only warns
        (encoded(Image.new("1", (9000, 9000)), "PNG"), "9000 x 9000 pixels, at most"),
        (encoded(photo(20, 20), "PNG", save_all=True, append_images=[Image.new("RGB", (20, 20))]), "animated"),
        (encoded(photo(20, 20), "WEBP", save_all=True, append_images=[Image.new("RGB", (20, 20))]), "animated"),
    ],
    ids=["empty", "gif header", "gif", "tiff", "cut png", "cut jpeg", "bomb", "small bomb", "large", "apng", "moving webp"],
)
def test_what_is_no_still_image_within_the_limits_is_refused(content: bytes, reason: str) -> None:
    with pytest.raises(UNFIT, match=reason):
        fitted(content, Fit(8))


def test_of_a_jpeg_with_more_pictures_behind_it_the_first_is_taken() -> None:
    content = encoded(photo(40, 40), "MPO", quality=98, subsampling=0, save_all=True, append_images=[Image.new("RGB", (40, 40))])
    one = fitted(content, KEEP)
    assert one.extension == "jpg" and len(one.content) < len(content)
    assert difference(pixels(one), photo(40, 40).tobytes()) < 5


def test_too_many_bytes_are_refused_before_they_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_shards.packing.fit.MAX_IMAGE_BYTES", 10)
    with pytest.raises(ValueError, match="bytes, at most 10 are allowed"):
        open_image(encoded(photo(20, 20), "PNG"))


@pytest.mark.parametrize(
    ("size", "image_format", "crop", "max_size", "message"),
    [
        (16, "png", "none", None, "crop=none keeps the shape"),
        (16, "keep", "centre", None, "image_format=keep keeps files as they are"),
        (16, "png", "centre", 8, "max_size=8 is for images of their own size"),
        (10_000, "png", "centre", None, "at most 8192 pixels a side"),
        (None, "png", "none", 0, "max_size=0 must be at least 1"),
    ],
)
def test_what_does_not_go_together_is_refused(size: int | None, image_format: str, crop: str, max_size: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fit(size, image_format, crop, max_size)  # type: ignore[arg-type]
