"""Lines with their spreads as a PNG, without a plotting library: for the studies' figures."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean
from typing import final

from PIL import Image, ImageDraw, ImageFont

_SIZE, _LEFT, _RIGHT, _TOP, _BOTTOM = (920, 480), 70, 260, 56, 64
_COLOURS = ("#1f6fb4", "#d4502a", "#3d8f4f", "#8a56a8", "#7a7a7a", "#b58a1c")
_INK, _GRID = "#222222", "#e2e2e2"


@final
@dataclass(frozen=True)
class Line:
    """One line: at each tick the values that were measured, whose mean is drawn, and a bar from the lowest to the highest."""

    name: str
    values: Sequence[Sequence[float]]
    colour: int = 0
    dashed: bool = False


def line_plot(title: str, ticks: Sequence[str], lines: Sequence[Line], *, x_label: str, y_label: str) -> Image.Image:
    """Lines over evenly spaced ticks, the vertical axis logarithmic.

    Raises: ValueError if a value is not above 0, or there is none."""
    numbers = [value for line in lines for values in line.values for value in values]
    if not numbers or min(numbers) <= 0:
        raise ValueError(f"{title}: wanted values above 0 to plot, got {sorted(numbers)[:3]}")
    bottom, top = math.log10(min(numbers)) - 0.04, math.log10(max(numbers)) + 0.04
    width, height = _SIZE
    picture = Image.new("RGB", _SIZE, "white")
    draw, text, small = ImageDraw.Draw(picture), ImageFont.load_default(15), ImageFont.load_default(13)

    def x(tick: int) -> float:
        return _LEFT + (width - _LEFT - _RIGHT) * (tick + 0.5) / len(ticks)

    def y(value: float) -> float:
        return height - _BOTTOM - (height - _TOP - _BOTTOM) * (math.log10(value) - bottom) / (top - bottom)

    draw.text((_LEFT, 12), title, _INK, text)
    for value in _round_values(10**bottom, 10**top):
        draw.line((_LEFT, y(value), width - _RIGHT, y(value)), _GRID)
        draw.text((_LEFT - 8, y(value)), f"{value:g}", _INK, small, anchor="rm")
    for tick, label in enumerate(ticks):
        draw.text((x(tick), height - _BOTTOM + 8), label, _INK, small, anchor="ma")
    draw.text(((_LEFT + width - _RIGHT) / 2, height - 28), x_label, _INK, small, anchor="ma")
    draw.text((_LEFT, 32), y_label, _INK, small)
    for line in lines:
        colour = _COLOURS[line.colour % len(_COLOURS)]
        points = [(x(tick), y(fmean(values))) for tick, values in enumerate(line.values) if values]
        for tick, values in enumerate(line.values):
            if values:
                draw.line((x(tick), y(min(values)), x(tick), y(max(values))), colour, 1)
        for start, end in pairwise(points):
            _stroke(draw, start, end, colour, dashed=line.dashed)
        for at_x, at_y in points:
            draw.ellipse((at_x - 3, at_y - 3, at_x + 3, at_y + 3), fill="white" if line.dashed else colour, outline=colour, width=2)
    _legend(draw, lines, small, left=width - _RIGHT + 14)
    return picture


def beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one height in a row."""
    row = Image.new("RGB", (sum(picture.width for picture in pictures), max(picture.height for picture in pictures)), "white")
    left = 0
    for picture in pictures:
        row.paste(picture, (left, 0))
        left += picture.width
    return row


def below(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width in a column."""
    column = Image.new("RGB", (max(picture.width for picture in pictures), sum(picture.height for picture in pictures)), "white")
    top = 0
    for picture in pictures:
        column.paste(picture, (0, top))
        top += picture.height
    return column


def _round_values(low: float, high: float) -> list[float]:
    """1, 1.5, 2, 3, 5 and 7 times powers of ten in between; where those are fewer than three, multiples of 1, 2 or 5 times one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [value for decade in decades for step in (1, 1.5, 2, 3, 5, 7) if low <= (value := step * 10.0**decade) <= high]
    if len(values) >= 3:
        return values
    power = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = max(factor * power for factor in (1, 2, 5) if factor * power <= (high - low) / 3)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _stroke(draw: ImageDraw.ImageDraw, start: tuple[float, float], end: tuple[float, float], colour: str, *, dashed: bool) -> None:
    if not dashed:
        draw.line((*start, *end), colour, 2)
        return
    length = math.dist(start, end)
    for first in range(0, int(length), 10):
        ends = [tuple(a + (b - a) * min(1.0, where / length) for a, b in zip(start, end, strict=True)) for where in (first, first + 6)]
        draw.line((*ends[0], *ends[1]), colour, 2)


def _legend(draw: ImageDraw.ImageDraw, lines: Sequence[Line], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, *, left: int) -> None:
    for number, line in enumerate(lines):
        at_y = _TOP + 12 + 19 * number
        _stroke(draw, (left, at_y), (left + 30, at_y), _COLOURS[line.colour % len(_COLOURS)], dashed=line.dashed)
        draw.text((left + 38, at_y), line.name, _INK, font, anchor="lm")
