"""The sheet: where pictures, titles and texts stand."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from trainer.prompting.sheet import SheetGroup, _wrapped, draw_sheet, masked_input

PROMPTS = ["a couple", "a woman", "a girl writing a letter in candlelight"]


def group(title: str, *, prompts: int = 3, seeds: int = 2, size: int = 128, channels: int = 3) -> SheetGroup:
    """Every picture of one level: 40 and ten for each row, one for each column."""
    levels = torch.arange(prompts)[:, None] * 10 + torch.arange(seeds) + 40
    return SheetGroup(title, levels.to(torch.uint8)[..., None, None, None].expand(-1, -1, size, size, channels).contiguous())


def flat_pixels(sheet: Image.Image, level: int) -> int:
    return int((np.asarray(sheet) == level).all(axis=2).sum())


def columns_of(sheet: Image.Image, level: int) -> tuple[int, int]:
    """The first and the last column with a picture of this level; letters' edges have few such pixels."""
    columns = np.flatnonzero((np.asarray(sheet) == level).all(axis=2).sum(axis=0) > 100)
    return int(columns[0]), int(columns[-1])


def test_every_picture_is_shown_whole_and_once() -> None:
    sheet = draw_sheet(PROMPTS, [group("base | step 0"), group("EMA | step 500")], seeds=(0, 1))
    for row in range(3):
        for column in range(2):
            assert flat_pixels(sheet, 40 + row * 10 + column) >= 2 * 128 * 128
    assert sheet.size == (24 + 179 + 28 + 2 * 260 + 28 + 24, sheet.height)
    assert 3 * 128 < sheet.height < 3 * 128 + 160


def test_rows_are_prompts_and_columns_are_seeds() -> None:
    sheet = np.asarray(draw_sheet(PROMPTS, [group("EMA")]))[..., 0]
    rows, columns = zip(
        *(np.argwhere(sheet == 40 + 10 * row + column).mean(axis=0) for row in range(3) for column in range(2)), strict=True
    )
    assert np.allclose(np.diff(np.reshape(columns, (3, 2)), axis=1), 132, atol=2)
    assert np.allclose(np.diff(np.reshape(rows, (3, 2)), axis=0), 128 + 20, atol=2)


@pytest.mark.parametrize(("size", "shown"), [(32, 128), (64, 128), (128, 128), (200, 200), (512, 256), (1024, 256)])
def test_pictures_are_shown_at_128_to_256_pixels(size: int, shown: int) -> None:
    sheet = draw_sheet(["a car"], [group("EMA", prompts=1, seeds=1, size=size)])
    assert shown**2 <= flat_pixels(sheet, 40) < shown**2 + 20


def test_groups_of_other_sizes_and_grey_ones_are_shown_alike() -> None:
    sheet = draw_sheet(PROMPTS, [group("base"), group("EMA", size=64, channels=1)])
    assert flat_pixels(sheet, 40) >= 2 * 128 * 128


def test_a_masked_input_stands_before_the_groups() -> None:
    given = torch.full((3, 64, 64, 3), 7, dtype=torch.uint8)
    sheet = draw_sheet(PROMPTS, [group("EMA")], seeds=(0, 1), given=given)
    assert flat_pixels(sheet, 7) >= 3 * 128 * 128
    assert columns_of(sheet, 7)[1] < columns_of(sheet, 40)[0]


def test_a_long_prompt_makes_its_row_higher_and_no_text_leaves_its_column() -> None:
    plain = draw_sheet(["a car"], [group("EMA", prompts=1)])
    long = draw_sheet(["a car " * 60 + "x" * 80], [group("EMA", prompts=1)])
    assert long.height > plain.height + 100
    left, _ = columns_of(long, 40)
    assert (np.asarray(long)[:, left - 20 : left] == 255).all()


def test_text_is_broken_between_words_and_loses_none() -> None:
    font = ImageFont.load_default(size=18)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert _wrapped("a girl writing a letter in candlelight", font, 200) == ["a girl writing a letter in", "candlelight"]
    pieces = _wrapped(f"one {'x' * 100} two", font, 200)
    assert "".join(pieces).replace(" ", "") == f"one{'x' * 100}two"
    assert all(font.getlength(line) <= 200 for line in pieces)
    assert _wrapped("", font, 200) == [""]


def test_notes_add_a_line() -> None:
    with_notes = np.asarray(draw_sheet(PROMPTS, [group("EMA")], notes=["CLIP score 24.1"] * 3))
    assert (with_notes != np.asarray(draw_sheet(PROMPTS, [group("EMA")]))).any()


def test_a_masked_input_is_what_pipelines_blank_out(picture: Image.Image, mask: Image.Image) -> None:
    shown = masked_input(picture, mask, (64, 64))
    assert (shown[16:48, 16:48] == 128).all()
    assert np.array_equal(shown[:16], np.asarray(picture)[:16])
    assert masked_input(picture, mask, (32, 48)).shape == (32, 48, 3)


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="0 prompts"):
        draw_sheet([], [group("EMA")])
    with pytest.raises(ValueError, match="2 prompts: group 'EMA' has 3 rows"):
        draw_sheet(PROMPTS[:2], [group("EMA")])
    with pytest.raises(ValueError, match="masked inputs has 1 rows"):
        draw_sheet(PROMPTS, [group("EMA")], given=torch.zeros((1, 8, 8, 3), dtype=torch.uint8))
    with pytest.raises(ValueError, match="2 pictures a prompt, there are 3 seeds"):
        draw_sheet(PROMPTS, [group("EMA")], seeds=(0, 1, 2))
