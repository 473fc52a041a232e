"""A sheet of pictures as one image: a row a prompt with its text, a block of columns a group such as `EMA`, a column a seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

WHITE = 128
"""A mask's level from which pipelines paint; anything darker is kept."""
_INK, _SOFT, _RULE, _PAGE = "#1c1b1a", "#6b6762", "#e4e0da", "#ffffff"
_COLOURS = ("#1c1b1a", "#2f5fd0", "#c2571a", "#1f8a5f", "#8b4bb8", "#a2781b")
"""Of the groups' titles; the report's own colours."""
_MARGIN, _GAP, _BLOCK_GAP, _ROW_GAP = 24, 4, 28, 20
"""Pixels around all, between two pictures, between two groups, between two prompts."""
_TEXT_WIDTH = 200
"""Of a prompt's lines at most; those of larger pictures may be as long as these are wide."""
_SMALLEST_TILE, _LARGEST_TILE = 128, 256


@final
@dataclass(frozen=True, eq=False)
class SheetGroup:
    """What one model drew: all prompts, each from the same seeds."""

    title: str
    images: UInt8[Tensor, "p s h w c"]


def draw_sheet(
    prompts: Sequence[str],
    groups: Sequence[SheetGroup],
    *,
    seeds: Sequence[int] = (),
    given: UInt8[Tensor, "p h w c"] | None = None,
    notes: Sequence[str] = (),
) -> Image.Image:
    """The sheet, on white; pictures are shown 128 to 256 pixels high, as they are in between.

    seeds: written over the columns; none for no such line. given: of each prompt the masked input, shown before the groups.
    notes: a line of small text under each prompt, such as its CLIP score; none for no such lines.
    Raises: ValueError if there is no prompt or group, or the counts do not fit."""
    _check(prompts, groups, seeds=seeds, given=given, notes=notes)
    shown = [*([] if given is None else [SheetGroup("masked input", given.unsqueeze(1))]), *groups]
    tile_width, tile_height = _tile_size(shown)
    title_font, text_font, small_font = (_font(size) for size in _font_sizes(tile_width))
    texts = [_wrapped(prompt, text_font, max(_TEXT_WIDTH, tile_width)) for prompt in prompts]
    widths = [text_font.getlength(line) for lines in texts for line in lines] + [small_font.getlength(note) for note in notes]
    lefts, right = _columns(shown, tile_width, titles=title_font, start=_MARGIN + round(max(widths)) + _BLOCK_GAP)
    head = _MARGIN + round(title_font.size * 1.6) + (round(small_font.size * 1.6) if seeds else 0)

    text_line, note_line = round(text_font.size * 1.35), round(small_font.size * 1.7)
    needed = [len(lines) * text_line + (note_line if notes else 0) for lines in texts]
    heights = [max(tile_height, height) for height in needed]
    sheet = Image.new("RGB", (right + _MARGIN, head + sum(heights) + _ROW_GAP * (len(prompts) - 1) + _MARGIN), _PAGE)
    draw = ImageDraw.Draw(sheet)

    for number, (group, left) in enumerate(zip(shown, lefts, strict=True)):
        is_input = given is not None and number == 0
        colour = _SOFT if is_input else _COLOURS[(number - (given is not None)) % len(_COLOURS)]
        draw.text((left, _MARGIN), group.title, fill=colour, font=title_font, anchor="la")
        if seeds and not is_input:
            for column, seed in enumerate(seeds):
                at = (left + column * (tile_width + _GAP), head - small_font.size * 0.5)
                draw.text(at, f"seed {seed}", fill=_SOFT, font=small_font, anchor="ls")

    top = head
    for row, (lines, height) in enumerate(zip(texts, heights, strict=True)):
        if row:
            draw.line((_MARGIN, top - _ROW_GAP // 2, right, top - _ROW_GAP // 2), fill=_RULE)
        at = top + (height - needed[row]) // 2
        for number, line in enumerate(lines):
            draw.text((_MARGIN, at + number * text_line), line, fill=_INK, font=text_font, anchor="la")
        if notes:
            draw.text((_MARGIN, at + needed[row] - small_font.size * 1.3), notes[row], fill=_SOFT, font=small_font, anchor="la")
        for group, left in zip(shown, lefts, strict=True):
            for column, image in enumerate(group.images[row].numpy()):
                sheet.paste(_tile(image, tile_width, tile_height), (left + column * (tile_width + _GAP), top))
        top += height + _ROW_GAP
    return sheet


def masked_input(image: Image.Image, mask: Image.Image, size: tuple[int, int]) -> UInt8[np.ndarray, "h w c"]:
    """What an inpainting model is shown: the image with grey where the mask is white, as pipelines scale both.

    size: height and width in pixels."""
    height, width = size
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS))
    painted = np.asarray(mask.convert("L").resize((width, height), Image.Resampling.LANCZOS)) >= WHITE
    return np.where(painted[..., None], np.uint8(128), pixels)


def _check(
    prompts: Sequence[str],
    groups: Sequence[SheetGroup],
    *,
    seeds: Sequence[int],
    given: UInt8[Tensor, "p h w c"] | None,
    notes: Sequence[str],
) -> None:
    if not prompts or not groups:
        raise ValueError(f"a sheet of {len(prompts)} prompts and {len(groups)} groups is empty; give at least one of each")
    counts = {f"group {group.title!r}": len(group.images) for group in groups}
    counts |= {} if given is None else {"the masked inputs": len(given)}
    counts |= {"the notes": len(notes)} if notes else {}
    for name, count in counts.items():
        if count != len(prompts):
            raise ValueError(f"a sheet of {len(prompts)} prompts: {name} has {count} rows; give one a prompt")
    for group in groups:
        if seeds and group.images.shape[1] != len(seeds):
            raise ValueError(f"group {group.title!r} has {group.images.shape[1]} pictures a prompt, there are {len(seeds)} seeds")


def _tile_size(groups: Sequence[SheetGroup]) -> tuple[int, int]:
    """Width and height at which all pictures are shown: those of the largest, scaled by a whole factor if too small."""
    height = max(group.images.shape[2] for group in groups)
    width = max(group.images.shape[3] for group in groups)
    longest = max(height, width)
    if longest < _SMALLEST_TILE:
        factor = _SMALLEST_TILE // longest
        return width * factor, height * factor
    scale = min(1.0, _LARGEST_TILE / longest)
    return round(width * scale), round(height * scale)


def _tile(image: UInt8[np.ndarray, "h w c"], width: int, height: int) -> Image.Image:
    grey = image.shape[2] == 1
    tile = Image.fromarray(np.repeat(image, 3, axis=2) if grey else image)
    resample = Image.Resampling.LANCZOS if tile.width > width else Image.Resampling.BICUBIC
    return tile if tile.size == (width, height) else tile.resize((width, height), resample)


def _font_sizes(tile_width: int) -> tuple[int, int, int]:
    """Of titles, prompts and small text, in pixels: larger where the pictures are."""
    return (20, 20, 15) if tile_width > 192 else (18, 18, 14)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size=size)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow's wheels have FreeType"
    return font


def _columns(groups: Sequence[SheetGroup], tile_width: int, *, titles: ImageFont.FreeTypeFont, start: int) -> tuple[list[int], int]:
    """Where each group begins, and where the last ends: a group is as wide as its pictures, or as its title if that is longer."""
    lefts, left, right = [], start, start
    for group in groups:
        lefts.append(left)
        count = group.images.shape[1]
        right = left + max(count * (tile_width + _GAP) - _GAP, round(titles.getlength(group.title)))
        left = right + _BLOCK_GAP
    return lefts, right


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Text in lines of at most `width` pixels, broken between words, or within a word that is longer than a line."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        pieces = _pieces(word, font, width)
        lines = [*(lines if lines[-1] else lines[:-1]), *pieces]
    return lines


def _pieces(word: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    pieces = [""]
    for letter in word:
        if pieces[-1] and font.getlength(pieces[-1] + letter) > width:
            pieces.append("")
        pieces[-1] += letter
    return pieces
