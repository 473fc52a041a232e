"""A contact sheet of shards with their captions: images side by side, the words below them."""

import os
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from data_shards.config import CAPTION_EXTENSION
from data_shards.index import Shard, ShardIndex
from data_shards.info import shown_image
from data_shards.keyed import permutation
from data_shards.remote.store import Store, store_of

CELL_PIXELS = 192
_GAP_PIXELS = 8
_FONT_PIXELS = 13
_LINES = 5


def caption_sheet(index: ShardIndex, *, rows: int = 4, columns: int = 6, seed: int = 0) -> Image.Image:
    """Some samples, drawn by seed, each over its caption; one that is too long ends in dots.

    Raises: ValueError naming a sample whose image can't be shown."""
    places = [(shard, position) for shard, count in enumerate(index.samples_per_shard) for position in range(count)]
    shown = [places[place] for place in permutation(len(places), seed, "caption sheet")[: rows * columns]]
    font, store = ImageFont.load_default(_FONT_PIXELS), store_of(index)
    line_pixels = round(_FONT_PIXELS * 1.3)
    width, height = CELL_PIXELS + _GAP_PIXELS, CELL_PIXELS + 2 * _GAP_PIXELS + _LINES * line_pixels
    columns = min(columns, len(shown))
    sheet = Image.new("RGB", (columns * width + _GAP_PIXELS, -(-len(shown) // columns) * height + _GAP_PIXELS), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (shard, position) in enumerate(shown):
        left, top = number % columns * width + _GAP_PIXELS, number // columns * height + _GAP_PIXELS
        image = shown_image(index, index.shards[shard], position, CELL_PIXELS)
        sheet.paste(image, (left + (CELL_PIXELS - image.width) // 2, top + (CELL_PIXELS - image.height) // 2))
        for line, text in enumerate(wrapped(_caption(store, index.shards[shard], position), font, CELL_PIXELS, _LINES)):
            draw.text((left, top + CELL_PIXELS + _GAP_PIXELS + line * line_pixels), text, fill="black", font=font)
    return sheet


def _caption(store: Store, shard: Shard, position: int) -> str:
    members = shard.members.get(CAPTION_EXTENSION)
    if members is None or members.sizes[position] < 0:
        return ""
    with store.open(shard) as file:
        return os.pread(file.fileno(), members.sizes[position], members.offsets[position]).decode(errors="replace")


def wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> list[str]:
    """A text in at most `lines` lines of at most `width` pixels, broken between words, or within one that is too long."""
    found = [""]
    for word in text.split():
        rest = f"{found[-1]} {word}".strip()
        if font.getlength(rest) > width and found[-1]:
            found.append("")
            rest = word
        while font.getlength(rest) > width:
            fits = max(1, next(count for count in range(len(rest), -1, -1) if font.getlength(rest[:count]) <= width))
            found[-1], rest = rest[:fits], rest[fits:]
            found.append("")
        found[-1] = rest
    if len(found) <= lines:
        return found
    last = found[lines - 1]
    while last and font.getlength(f"{last}...") > width:
        last = last[:-1]
    return [*found[: lines - 1], f"{last}..."]


def write_caption_sheet(index: ShardIndex, path: str | Path) -> None:
    """Write the sheet as a PNG."""
    caption_sheet(index).save(path, format="PNG")
