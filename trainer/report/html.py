"""Small pieces of HTML that several parts of the report share."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from trainer.report.plots import Series

COLOURS = ("--student", "--teacher", "--third", "--fourth", "--fifth")
_SHARPEST_PIXELS = 96


def data_uri(png: bytes) -> str:
    """A PNG file as an address that needs no network."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def strip(images: UInt8[Tensor, "b h w c"], label: str) -> str:
    """Pictures side by side; small ones are enlarged by a whole factor."""
    cells = []
    for number, image in enumerate(images.numpy()):
        tile = Image.fromarray(image.squeeze())
        factor = max(1, _SHARPEST_PIXELS // max(tile.size))
        if factor > 1:
            tile = tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        tile.save(buffer, format="PNG", optimize=True)
        cells.append(f'<img src="{data_uri(buffer.getvalue())}" alt="{escape(label, quote=True)}, picture {number + 1}">')
    return f'<div class="row">{"".join(cells)}</div>'


def table(head: str, lines: Iterable[str], *, style: str = "") -> str:
    """A table that is scrolled sideways where it is wider than the page. head, lines: the insides of its rows. style: a CSS class."""
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table class="{style}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def heads(names: Iterable[str]) -> str:
    """Cells over columns."""
    return "".join(f"<th>{escape(name)}</th>" for name in names)


def legend(series: Sequence[Series]) -> str:
    """Lines' colours with their names."""
    entries = "".join(f'<span><i style="background:var({each.colour})"></i>{escape(each.label)}</span>' for each in series)
    return f'<div class="legend">{entries}</div>'


def steps_text(count: int, *, bare: bool = False) -> str:
    """`1 step`, `8 steps`; bare: the word alone."""
    word = "step" if count == 1 else "steps"
    return word if bare else f"{count} {word}"


def duration(seconds: float) -> str:
    """Seconds in the unit that a person would say them in."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
