"""A JPEG whose head says that it has one scan isn't searched for more, and costs nothing if it lies."""

import io
import struct
from time import process_time

import numpy as np
import pytest
from PIL import Image

from data_shards.image_header import SEARCHED_BYTES, DecodeError, check_scans
from data_shards.images import image_pixels


def jpeg(mode: str, *, progressive: bool, side: int = 256) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(file, "JPEG", quality=95, progressive=progressive)
    assert len(file.getvalue()) >= SEARCHED_BYTES
    return file.getvalue()


def with_scans(content: bytes, count: int) -> bytes:
    first = content.index(b"\xff\xda")
    return content[:first] + content[first:-2] * count + content[-2:]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [True, False])
def test_honest_ones_pass(mode: str, progressive: bool) -> None:
    check_scans(jpeg(mode, progressive=progressive))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_many_scans_are_refused_where_libjpeg_would_read_them_all(mode: str) -> None:
    with pytest.raises(DecodeError, match="scans, at most 100 are decoded"):
        check_scans(with_scans(jpeg(mode, progressive=True), 200))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_second_scan_where_there_is_one_ends_the_decoder(mode: str) -> None:
    with pytest.raises(DecodeError, match="broken data stream"):
        image_pixels(with_scans(jpeg(mode, progressive=False), 2), "jpg", size=(256, 256))


def test_scans_of_single_components_are_counted() -> None:
    content = jpeg("RGB", progressive=False)
    first = content.index(b"\xff\xda")
    (length,) = struct.unpack_from(">H", content, first + 2)
    alone = b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00" + content[first + 2 + length : -2]  # its components come one by one
    with pytest.raises(DecodeError, match="has 101 scans"):
        check_scans(content[:first] + alone * 101 + content[-2:])


def test_a_large_one_with_many_scans_costs_no_more_than_one() -> None:
    content = jpeg("RGB", progressive=False)
    frame, first = content.index(b"\xff\xc0"), content.index(b"\xff\xda")
    bomb = content[: frame + 5] + struct.pack(">HH", 8000, 8000) + content[frame + 9 : first] + content[first:-2] * 100 + content[-2:]
    start = process_time()
    with pytest.raises(DecodeError, match="broken data stream"):
        image_pixels(bomb, "jpg", size=(8000, 8000))
    assert process_time() - start < 10  # it is 0.2 s; a hundred scans of this size are 50


@pytest.mark.parametrize("cut", [2, 5, 30, 200])
def test_a_cut_head_is_searched(cut: int) -> None:
    check_scans(jpeg("RGB", progressive=False)[:cut] + bytes(SEARCHED_BYTES))
