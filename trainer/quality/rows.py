"""Work that falls into rows, such as a feature vector an image, divided among the ranks and put together again."""

import json
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from data_shards import ranks


class Divide(Protocol):
    """Computes `count` rows, whole or in parts; `part` makes the rows of a range, none of them for an empty one."""

    def __call__(self, count: int, part: Callable[[range], Tensor], /) -> Tensor: ...


def here(count: int, part: Callable[[range], Tensor], /) -> Tensor:
    """All rows in this process."""
    return part(range(count))


def on_ranks(count: int, part: Callable[[range], Tensor], /) -> Tensor:
    """Each rank makes its share; all have all rows. Collective."""
    return gather_rows(part(ranks.share(count)))


def batches_of_rank(count: int, batch_size: int) -> Iterator[range]:
    """The numbers 0 ... count - 1 in batches, this rank's whole batches of them: what is in a batch does not depend on the ranks."""
    for batch in ranks.share(-(-count // batch_size)):
        yield range(batch * batch_size, min((batch + 1) * batch_size, count))


def gather_rows(mine: Tensor) -> Tensor:
    """The ranks' rows, of any number, one rank's after the other, where `mine` lies; a rank without rows need not know their shape.

    Raises: PeerLost. Collective."""
    if ranks.world_size() == 1:
        return mine
    shapes = [json.loads(text) for text in ranks.all_gather_text(json.dumps([*mine.shape]))]
    row = next((shape[1:] for shape in shapes if shape[0]), list(mine.shape[1:]))
    padded = torch.zeros((max(shape[0] for shape in shapes), *row), dtype=mine.dtype)
    if len(mine):
        padded[: len(mine)] = mine.cpu()
    parts = ranks.all_gather_tensor(padded)
    return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)]).to(mine.device)
