"""Masks: what each kind looks like, that none is empty, and that they depend on seed, step and sample alone."""

import statistics
import time
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import max_pool2d

from trainer.masks import KINDS, MaskKind, draw_mask, draw_masks, latent_mask

EVERY_KIND: dict[MaskKind, float] = dict.fromkeys(KINDS, 1.0)
SIDES = st.integers(2, 12).map(lambda cells: 8 * cells)


def drawn(kind: MaskKind, seed: int, size: tuple[int, int] = (128, 96)) -> Tensor:
    return draw_mask(kind, size, torch.Generator().manual_seed(seed))


def bounds(region: Tensor) -> tuple[int, int, int, int]:
    """left, top, right, bottom of what is true."""
    rows, columns = region.any(1).nonzero().flatten(), region.any(0).nonzero().flatten()
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def inside_bounds(region: Tensor) -> Tensor:
    left, top, right, bottom = bounds(region)
    return region[top:bottom, left:right]


def is_connected(mask: Tensor) -> bool:
    """Whether what grows from one pixel of a mask [1, h, w] fills it."""
    found = torch.zeros_like(mask)
    found.view(-1)[mask.argmax()] = 1
    while True:
        grown = max_pool2d(found, 3, stride=1, padding=1) * mask
        if torch.equal(grown, found):
            return torch.equal(found, mask)
        found = grown


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), height=SIDES, width=SIDES, seed=st.integers(0, 2**32))
def test_a_mask_is_zeros_and_ones_and_never_empty_not_even_as_a_latents(kind: MaskKind, height: int, width: int, seed: int) -> None:
    mask = drawn(kind, seed, (height, width))
    assert mask.shape == (1, height, width) and mask.dtype == torch.float32
    assert bool(((mask == 0) | (mask == 1)).all())
    small = latent_mask(mask[None])
    assert small.shape == (1, 1, height // 8, width // 8) and small.max() == 1
    assert (mask.min() == 1) == (kind == "full" or bool(mask.all()))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), cell=st.sampled_from([2, 4, 8]))
def test_shapes_are_what_their_names_say(seed: int, cell: int) -> None:
    def region(kind: MaskKind) -> Tensor:
        return draw_mask(kind, (80, 128), torch.Generator().manual_seed(seed), cell=cell)[0] == 1

    rectangle = inside_bounds(region("rectangle"))
    assert bool(rectangle.all()) and min(rectangle.shape) >= cell
    ellipse = inside_bounds(region("ellipse"))
    assert torch.equal(ellipse, ellipse.flip(0)) and torch.equal(ellipse, ellipse.flip(1))
    assert abs(ellipse.float().mean().item() - torch.pi / 4) < 0.15, "fills pi / 4 of its box, but for its rim of whole pixels"
    assert is_connected(region("brush").float()[None]), "strokes are joined"
    border = ~region("outpainting")
    assert bool(inside_bounds(border).all()) and min(inside_bounds(border).shape) >= cell, "what is left is one rectangle"
    left, top, right, bottom = bounds(border)
    assert all(width == 0 or cell <= width <= side // 2 for width, side in ((left, 128), (128 - right, 128), (top, 80), (80 - bottom, 80)))
    assert (left, top, right, bottom) != (0, 0, 128, 80)


def test_a_rectangles_sides_are_uniform_up_to_the_whole_image() -> None:
    stream = torch.Generator().manual_seed(0)
    sides = [inside_bounds(draw_mask("rectangle", (128, 128), stream)[0] == 1).shape for _ in range(1000)]
    for side in zip(*sides, strict=True):
        quarters = Counter(min(pixels // 32, 3) for pixels in side)
        assert all(200 < quarters[quarter] < 300 for quarter in range(4)) and max(side) > 124


def test_one_to_four_sides_are_painted_and_each_of_them() -> None:
    found: Counter[tuple[bool, ...]] = Counter()
    stream = torch.Generator().manual_seed(0)
    for _ in range(400):
        left, top, right, bottom = bounds(draw_mask("outpainting", (64, 64), stream)[0] == 0)
        found[left > 0, top > 0, right < 64, bottom < 64] += 1
    assert len(found) == 15, "every choice of sides but none"
    assert all(70 < sum(n for sides, n in found.items() if sum(sides) == count) < 135 for count in (1, 2, 3, 4))


def test_brushes_paint_a_part_that_is_neither_tiny_nor_most_of_the_image() -> None:
    areas = [drawn("brush", seed).mean().item() for seed in range(200)]
    assert min(areas) > 0.02 and max(areas) < 0.6 and 0.1 < statistics.mean(areas) < 0.3


def test_a_sample_has_its_mask_whatever_stands_beside_it() -> None:
    keys = ["a", "b", "a", "cartoon/\u00e9t\u00e9", "a"]
    masks = draw_masks(7, 3, keys, size=(64, 64), shares=EVERY_KIND)
    assert masks.shape == (5, 1, 64, 64)
    again = draw_masks(7, 3, ["cartoon/\u00e9t\u00e9", "a", "b", "a", "a"], size=(64, 64), shares=dict(reversed(EVERY_KIND.items())))
    assert torch.equal(masks[[3, 0, 1, 2, 4]], again)
    assert torch.equal(masks[:1], draw_masks(7, 3, ["a"], size=(64, 64), shares=EVERY_KIND))
    others = [masks[0], masks[1], masks[2], masks[4]]
    others += [draw_masks(seed, step, ["a"], size=(64, 64), shares=EVERY_KIND)[0] for seed, step in ((7, 4), (8, 3))]
    assert not any(torch.equal(one, other) for at, one in enumerate(others) for other in others[:at])


def test_kinds_come_in_their_shares() -> None:
    keys = [str(number) for number in range(600)]
    masks = draw_masks(0, 0, keys, size=(16, 16), shares={"full": 1, "rectangle": 3, "ellipse": 0})
    whole = int((masks.flatten(1).min(1).values == 1).sum())
    assert 115 < whole < 195  # a quarter of them, and the odd rectangle over all of the image
    assert bool((draw_masks(0, 0, keys[:9], size=(16, 16), shares={"full": 0.1}) == 1).all())


@pytest.mark.parametrize("shares", [{}, {"full": 0}, {"full": -1, "brush": 2}, {"full": float("nan")}, {"full": float("inf")}])
def test_shares_that_choose_nothing_are_refused(shares: dict[MaskKind, float]) -> None:
    with pytest.raises(ValueError, match="wanted numbers from 0 on, one at least above 0"):
        draw_masks(0, 0, ["a"], size=(64, 64), shares=shares)


def test_unknown_kinds_and_images_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown kind of mask 'star'; wanted rectangle, ellipse, brush, outpainting, full"):
        draw_masks(0, 0, ["a"], size=(64, 64), shares={"star": 1})  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="masks of 64 x 8 pixels for latent cells of 8: wanted at least 16 a side"):
        drawn("full", 0, (64, 8))
    with pytest.raises(ValueError, match="20 x 16 pixels has no whole latent cells of 8"):
        latent_mask(torch.zeros(1, 1, 20, 16))


def test_a_latents_cell_is_the_pixel_at_its_upper_left() -> None:
    mask = (torch.rand(2, 1, 32, 48, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    assert torch.equal(latent_mask(mask), mask[:, :, ::8, ::8])
    assert torch.equal(latent_mask(mask, 2), mask[:, :, ::2, ::2])


def test_a_mask_takes_little_time() -> None:
    seconds: dict[MaskKind, float] = {}
    for kind in KINDS:
        stream, times = torch.Generator().manual_seed(0), []
        for _ in range(15):
            began = time.thread_time()
            draw_mask(kind, (512, 512), stream)
            times.append(time.thread_time() - began)
        seconds[kind] = statistics.median(times)
    assert max(seconds.values()) < 5e-3, seconds  # 0.03 to 0.3 ms on AMD EPYC
