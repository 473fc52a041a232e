"""Aspect-ratio buckets: shapes of about equal area, and which of them an image belongs to."""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from data_shards.index import ShardIndex

Size = tuple[int, int]  # width, height in pixels
_LEAST_AREA = 0.75  # of the square's: a shape far below it would waste a step


def bucket_sizes(image_size: int, *, multiple_of: int, max_aspect: float) -> list[Size]:
    """Widths and heights, widest first: multiples of `multiple_of`, within the area of a square of image_size and max_aspect.

    Source: aspect ratio bucketing as published for NovelAI's and SDXL's training (arXiv:2307.01952, appendix I).
    """
    area = image_size**2
    largest = {Fraction(1): (image_size, image_size)}  # of each aspect ratio
    for side in range(multiple_of, image_size + 1, multiple_of):
        longest = min(area // side, int(side * max_aspect)) // multiple_of * multiple_of
        if longest > side and longest * side > area * _LEAST_AREA:
            largest |= {Fraction(longest, side): (longest, side), Fraction(side, longest): (side, longest)}
    return [largest[aspect] for aspect in sorted(largest, reverse=True)]


def bucket_numbers(index: ShardIndex, sizes: Sequence[Size]) -> tuple[np.ndarray, ...]:
    """For each shard the bucket of each sample: the one whose aspect ratio is nearest on a logarithmic scale, the first of equal ones.

    Raises: ShardIndexError if the index does not say how large the images are.
    """
    aspects = np.log([width / height for width, height in sizes])
    numbers = []
    for shard in index.shards:
        stored = np.array([index.size_at(shard, position) for position in range(shard.samples)], dtype=np.float64)
        own = np.log(stored[:, 0] / stored[:, 1])
        numbers.append(np.abs(own[:, None] - aspects[None, :]).argmin(axis=1))
    return tuple(numbers)
