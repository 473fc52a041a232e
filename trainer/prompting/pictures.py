"""Drawing prompts with stock pipelines: one seed a picture, pictures of equal settings in one call, divided among the ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import final

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Generator, Tensor

from data_shards import ranks

Tick = Callable[[], None]
"""Called after every denoising step, for a watchdog."""


@final
@dataclass(frozen=True, eq=False)
class PictureRequest:
    """One picture. What is None is left to the pipeline's own default, so that a request draws what a plain call of it draws."""

    prompt: str
    seed: int
    """Of a generator on the CPU that is this picture's alone."""
    negative_prompt: str | None = None
    guidance_scale: float | None = None
    """Of the network that reads the text: the prior's of Wuerstchen and Kandinsky; 1 is none."""
    guidance_rescale: float = 0.0
    """0 to 1; Lin et al. 2023, arXiv:2305.08891, section 3.4."""
    steps: int | None = None
    """Of the network that reads the text."""
    size: tuple[int, int] | None = None
    """Height and width in pixels."""
    image: Image.Image | None = None
    """What is inpainted, together with `mask`: white is painted, black is kept."""
    mask: Image.Image | None = None
    decoder_guidance_scale: float | None = None
    """Of the second network of Wuerstchen and Kandinsky; so are decoder_steps."""
    decoder_steps: int | None = None

    def settings(self) -> tuple[object, ...]:
        """What all pictures of one call have in common."""
        numbers = (self.guidance_scale, self.guidance_rescale, self.steps, self.size, self.decoder_guidance_scale, self.decoder_steps)
        return (*numbers, self.negative_prompt is None, self.image is None)


Paint = Callable[[Sequence[PictureRequest], list[Generator], Tick], UInt8[Tensor, "b h w c"]]
"""Pictures of equal settings by one call of a pipeline, the noise of each from its own generator."""


def no_tick() -> None:
    """For who has no watchdog."""


def draw(paint: Paint, requests: Sequence[PictureRequest], *, batch_size: int, tick: Tick = no_tick) -> UInt8[Tensor, "b h w c"]:
    """The pictures in 0 ... 255 on the CPU, in the order of the requests, rounded as pipelines round them.

    A picture does not depend on what is drawn with it, but for the order of summation in larger batches (1/255 at most).
    Raises: ValueError if there is no request, or pictures are of several sizes."""
    if not requests:
        raise ValueError("there is no prompt to draw; give at least one")
    groups = _groups(requests)
    return _in_order(groups, [_draw_group(paint, [requests[index] for index in group], batch_size, tick) for group in groups])


def draw_on_ranks(paint: Paint, requests: Sequence[PictureRequest], *, batch_size: int, tick: Tick = no_tick) -> UInt8[Tensor, "b h w c"]:
    """The same on every rank, each rank having drawn a contiguous share of the requests of equal settings.

    All ranks call the network equally often, as one that is shared among them needs. Raises: ValueError as draw. Collective."""
    if not requests:
        raise ValueError("there is no prompt to draw; give at least one")
    groups, world_size = _groups(requests), ranks.world_size()
    drawn = []
    for group in groups:
        # A shorter share goes on beyond its end, at the end of all with the last request again, and is cut after the gather.
        first, longest = ranks.share(len(group)).start, -(-len(group) // world_size)
        mine = [requests[group[min(first + number, len(group) - 1)]] for number in range(longest)]
        gathered = ranks.all_gather_tensor(_draw_group(paint, mine, batch_size, tick).to(ranks.device())).cpu()
        bounds = [len(group) * number // world_size for number in range(world_size + 1)]
        drawn.append(torch.cat([part[: last - first] for part, (first, last) in zip(gathered, pairwise(bounds), strict=True)]))
    return _in_order(groups, drawn)


def to_bytes(images: Float[np.ndarray, "b h w c"]) -> UInt8[Tensor, "b h w c"]:
    """Images in [0, 1], a pipeline's output of type np, as its output of type pil rounds them."""
    return torch.from_numpy((images * 255).round().astype(np.uint8))


def _groups(requests: Sequence[PictureRequest]) -> list[list[int]]:
    """Indices of the requests by equal settings, first come first."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(request.settings(), []).append(index)
    return list(groups.values())


def _draw_group(paint: Paint, requests: Sequence[PictureRequest], batch_size: int, tick: Tick) -> UInt8[Tensor, "b h w c"]:
    batches = [requests[first : first + batch_size] for first in range(0, len(requests), batch_size)]
    return torch.cat([paint(batch, [Generator("cpu").manual_seed(request.seed) for request in batch], tick) for batch in batches])


def _in_order(groups: list[list[int]], drawn: list[UInt8[Tensor, "b h w c"]]) -> UInt8[Tensor, "b h w c"]:
    sizes = sorted({f"{part.shape[1]}x{part.shape[2]}" for part in drawn})
    if len(sizes) > 1:
        raise ValueError(f"pictures of {' and '.join(sizes)} pixels do not go together; ask for one size")
    order = torch.tensor([index for group in groups for index in group])
    return torch.cat(drawn)[order.argsort()]
