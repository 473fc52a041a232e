"""Masks of an inpainting micro-batch: which pixels are to be painted, drawn per sample from (seed, step, key)."""

import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal, assert_never, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from trainer.rng import generator

MaskKind = Literal["rectangle", "ellipse", "brush", "outpainting", "full"]
KINDS: tuple[MaskKind, ...] = get_args(MaskKind)

CELL_PIXELS = 8
# A circle of 1.5 cells holds a square of one cell, and so the pixel of it that a latent's mask is taken from.
ROUND_CELLS = 1.5
STROKES = (1, 4)
VERTICES = (3, 8)
SEGMENT_SIDES = (0.06, 0.25)
BRUSH_SIDES = (0.05, 0.16)
LARGEST_TURN = math.radians(70)

_Box = tuple[int, int, int, int]  # left, top, right, bottom; the last two are outside


def draw_masks(
    seed: int, step: int, keys: Sequence[str], *, size: tuple[int, int], shares: Mapping[MaskKind, float], cell: int = CELL_PIXELS
) -> Float[Tensor, "b 1 h w"]:
    """One mask per sample of a micro-batch; 1: to be painted, 0: given.

    A pure function of seed, step, a sample's key and how many samples of that key come before it. size: (height, width) in pixels;
    shares: how often each kind comes, in proportion; cell: pixels of a latent cell's side. No mask is empty, not even as a latent's.
    Raises: ValueError for shares that are negative, unknown or all 0, or for images under two cells a side."""
    weights = _checked_shares(shares)
    seen: Counter[str] = Counter()
    masks: list[Tensor] = []
    for key in keys:
        stream = generator(seed, "mask", step, hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest(), seen[key])
        seen[key] += 1
        masks.append(draw_mask(_drawn_kind(weights, stream), size, stream, cell=cell))
    return torch.stack(masks) if masks else torch.empty(0, 1, *size)


def draw_mask(kind: MaskKind, size: tuple[int, int], stream: torch.Generator, *, cell: int = CELL_PIXELS) -> Float[Tensor, "1 h w"]:
    """A mask of one kind; 1: to be painted. size: (height, width) in pixels; cell: pixels of a latent cell's side.

    rectangle, ellipse: sides uniform between a cell (1.5 for an ellipse) and the whole, anywhere inside the image. brush: joined
    strokes of one width. outpainting: a border along one to four sides, each of a cell up to half of the image.
    Raises: ValueError for images under two cells a side.
    Source: the first two follow diffusers' DreamBooth inpainting, examples/research_projects/dreambooth_inpaint."""
    height, width = size
    if min(size) < 2 * cell:
        raise ValueError(
            f"masks of {height} x {width} pixels for latent cells of {cell}: wanted at least {2 * cell} a side; set data.image_size"
        )
    mask = torch.zeros(1, height, width)
    match kind:
        case "rectangle":
            left, top, right, bottom = _box(size, cell, stream)
            mask[:, top:bottom, left:right] = 1
        case "ellipse":
            left, top, right, bottom = _box(size, math.ceil(ROUND_CELLS * cell), stream)
            canvas = Image.new("L", (width, height))
            ImageDraw.Draw(canvas).ellipse((left, top, right - 1, bottom - 1), fill=1)
            mask.copy_(_pixels(canvas))
        case "brush":
            mask.copy_(_pixels(_brushed(size, cell, stream)))
        case "outpainting":
            left, top, right, bottom = _kept(size, cell, stream)
            mask.fill_(1)[:, top:bottom, left:right] = 0
        case "full":
            mask.fill_(1)
        case _:
            assert_never(kind)
    return mask


def latent_mask(mask: Float[Tensor, "b 1 h w"], factor: int = CELL_PIXELS) -> Float[Tensor, "b 1 i j"]:
    """A mask at a latent's size: each cell is the pixel at its upper left, as stock inpainting pipelines have it.

    factor: pixels of a cell's side. Raises: ValueError if it does not divide the mask's sides."""
    height, width = mask.shape[-2:]
    if height % factor or width % factor:
        raise ValueError(f"a mask of {height} x {width} pixels has no whole latent cells of {factor}; set data.image_size to a multiple")
    return F.interpolate(mask, size=(height // factor, width // factor), mode="nearest")


def _checked_shares(shares: Mapping[MaskKind, float]) -> list[tuple[MaskKind, float]]:
    """Kinds and weights in one fixed order, whatever the mapping's."""
    unknown = sorted(set(shares) - set(KINDS))
    if unknown:
        raise ValueError(f"unknown kind of mask {unknown[0]!r}; wanted {', '.join(KINDS)}")
    weights: list[tuple[MaskKind, float]] = [(kind, float(shares.get(kind, 0.0))) for kind in KINDS]
    if not all(0 <= weight < math.inf for _, weight in weights) or not any(weight for _, weight in weights):
        raise ValueError(f"shares of masks are {dict(shares)}; wanted numbers from 0 on, one at least above 0")
    return weights


def _drawn_kind(weights: Sequence[tuple[MaskKind, float]], stream: torch.Generator) -> MaskKind:
    (at,) = _uniforms(1, stream)
    at *= sum(weight for _, weight in weights)
    last = KINDS[0]
    for kind, weight in weights:
        if at < weight:
            return kind
        at -= weight
        last = kind if weight else last
    return last  # rounding alone leads here


def _uniforms(count: int, stream: torch.Generator) -> list[float]:
    return torch.rand(count, generator=stream, dtype=torch.float64).tolist()


def _whole(uniform: float, low: int, high: int) -> int:
    """low .. high, equally likely."""
    return low + int(uniform * (high - low + 1))


def _between(uniform: float, bounds: tuple[float, float]) -> float:
    low, high = bounds
    return low + uniform * (high - low)


def _box(size: tuple[int, int], least: int, stream: torch.Generator) -> _Box:
    """Somewhere inside the image; sides uniform in 0 .. the whole, those under `least` made so."""
    height, width = size
    across, down, at_x, at_y = _uniforms(4, stream)
    wide = min(width, max(least, _whole(across, 0, width)))
    high = min(height, max(least, _whole(down, 0, height)))
    left, top = _whole(at_x, 0, width - wide), _whole(at_y, 0, height - high)
    return left, top, left + wide, top + high


def _kept(size: tuple[int, int], cell: int, stream: torch.Generator) -> _Box:
    """What an outpainting border leaves: at least a cell each way."""
    height, width = size
    count, *widths = _uniforms(5, stream)
    chosen = set(torch.randperm(4, generator=stream)[: _whole(count, 1, 4)].tolist())
    most_x, most_y = max(cell, (width - cell) // 2), max(cell, (height - cell) // 2)
    most = (most_x, most_y, most_x, most_y)
    left, top, right, bottom = (_whole(widths[side], cell, most[side]) if side in chosen else 0 for side in range(4))
    # An image of two cells has room for a border along one of two opposite sides.
    right, bottom = (right if left + right < width else 0), (bottom if top + bottom < height else 0)
    return left, top, width - right, height - bottom


def _brushed(size: tuple[int, int], cell: int, stream: torch.Generator) -> Image.Image:
    """Strokes of a round brush; each but the first starts on a corner of one before it, and none leaves the image."""
    height, width = size
    side = min(size)
    strokes, thickness, at_x, at_y = _uniforms(4, stream)
    diameter = max(math.ceil(ROUND_CELLS * cell), round(side * _between(thickness, BRUSH_SIDES)))
    low, high_x, high_y = diameter / 2, width - 1 - diameter / 2, height - 1 - diameter / 2
    corners = [(_between(at_x, (low, max(low, high_x))), _between(at_y, (low, max(low, high_y))))]
    canvas = Image.new("L", (width, height))
    brush = ImageDraw.Draw(canvas)
    for _ in range(_whole(strokes, *STROKES)):
        vertices, start, heading, *numbers = _uniforms(3 + 2 * VERTICES[1], stream)
        heading *= 2 * math.pi
        stroke = [corners[_whole(start, 0, len(corners) - 1)]]
        for turn, length in list(zip(numbers[::2], numbers[1::2], strict=True))[: _whole(vertices, *VERTICES)]:
            x, y = stroke[-1]
            heading += _between(turn, (-LARGEST_TURN, LARGEST_TURN))
            distance = side * _between(length, SEGMENT_SIDES)
            across, down = distance * math.cos(heading), distance * math.sin(heading)
            # A stroke that would leave the image turns back from its edge.
            across = across if low <= x + across <= high_x else -across
            down = down if low <= y + down <= high_y else -down
            heading = math.atan2(down, across)
            stroke.append((min(max(x + across, low), max(low, high_x)), min(max(y + down, low), max(low, high_y))))
        corners += stroke[1:]
        brush.line(stroke, fill=1, width=diameter)
    for x, y in corners:
        brush.ellipse((x - diameter / 2, y - diameter / 2, x + diameter / 2, y + diameter / 2), fill=1)
    return canvas


def _pixels(canvas: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(1, canvas.height, canvas.width)
