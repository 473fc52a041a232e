"""Endless rows of samples: shards laid end to end in an order drawn for each pass, and several such rows merged evenly."""

from __future__ import annotations  # array[int] is subscriptable from 3.12 on

from array import array
from bisect import bisect_right
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypeVar, final

import numpy as np

from data_shards.keyed import permutation

# Entries kept of pure functions: shard orders by pass, and as many sample orders as one process is likely to have lanes.
PASSES_KEPT = 2
SAMPLE_ORDERS_KEPT = 256
Place = tuple[int, int]  # shard, position in it
K = TypeVar("K")
V = TypeVar("V")


def interleaved(number: int, counts: Sequence[int]) -> tuple[int, int]:
    """Which of several rows comes at place `number` when rows of these lengths are merged evenly, and the place in that row.

    Over all sum(counts) places each row comes exactly as often as it is long, and in every prefix nearly so.
    """
    total = sum(counts)
    for row, count in enumerate(counts[:-1]):
        before = _passed(number, count, total)
        if _passed(number + 1, count, total) > before:
            return row, before
        number, total = number - before, total - count
    return len(counts) - 1, number


def passed(number: int, counts: Sequence[int]) -> list[int]:
    """How many of each row come before place `number` of the merged one, for number = 0 .. sum(counts)."""
    total, left = sum(counts), []
    for count in counts[:-1]:
        before = _passed(number, count, total)
        left.append(before)
        number, total = number - before, total - count
    return [*left, number]


def _passed(number: int, count: int, total: int) -> int:
    return (number * count + total // 2) // total if total else 0


def apportioned(total: int, weights: Sequence[int]) -> list[int]:
    """Whole numbers in proportion to `weights` that add up to `total`; the largest remainders are rounded up, first ones first."""
    whole = sum(weights)
    shares = [divmod(total * weight, whole) for weight in weights]
    missing = total - sum(share for share, _ in shares)
    up = set(sorted(range(len(weights)), key=lambda row: (-shares[row][1], row))[:missing])
    return [share + (row in up) for row, (share, _) in enumerate(shares)]


@final
@dataclass(frozen=True)
class ShardLine:
    """The samples of some consecutive shards, pass after pass without end, every sample once a pass.

    first: number of the first shard among all; positions: for each shard, which of its samples belong to this line, None for all of
    them; path: what tells its draws from those of other lines.
    """

    counts: tuple[int, ...]
    first: int
    seed: int
    path: tuple[int, ...] = ()
    samples_per_shard: tuple[int, ...] = ()
    positions: tuple[np.ndarray, ...] | None = None
    _shard_orders: dict[int, tuple[list[int], list[int]]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _sample_orders: dict[tuple[int, int], array[int]] = field(init=False, repr=False, compare=False, default_factory=dict)

    @cached_property
    def samples(self) -> int:
        """Samples of a pass."""
        return sum(self.counts)

    def places(self, start: int, stop: int) -> list[Place]:
        """Samples start .. stop-1 of the endless row."""
        places: list[Place] = []
        while start < stop:
            number, at = divmod(start, self.samples)
            order, ends = self._shard_order(number)
            turn = bisect_right(ends, at)
            shard = order[turn]
            inside = at - ends[turn] + self.counts[shard]
            taken = self._sample_order(number, shard)[inside : min(inside + stop - start, self.counts[shard])]
            places += [(self.first + shard, position) for position in taken]
            start += len(taken)
        return places

    def shards(self, start: int, stop: int, *, limit: int | None = None) -> list[int]:
        """The shards that samples start .. stop-1 lie in, in that order; at most `limit` of them."""
        found: list[int] = []
        while start < stop and (limit is None or len(found) < limit):
            number, at = divmod(start, self.samples)
            order, ends = self._shard_order(number)
            turn = bisect_right(ends, at)
            found.append(self.first + order[turn])
            start += ends[turn] - at
        return found

    def _shard_order(self, number: int) -> tuple[list[int], list[int]]:
        """Shards in the order of a pass, and where on the pass's line each ends."""

        def make() -> tuple[list[int], list[int]]:
            order = permutation(len(self.counts), self.seed, "shards", number, *self.path).tolist()
            return order, list(accumulate(self.counts[shard] for shard in order))

        return _kept(self._shard_orders, number, PASSES_KEPT, make)

    def _sample_order(self, number: int, shard: int) -> array[int]:
        """Positions of one shard's samples in the order of a pass."""

        def make() -> array[int]:
            samples = self.counts[shard] if self.positions is None else self.samples_per_shard[shard]
            order = permutation(samples, self.seed, "samples", number, self.first + shard)
            if self.positions is not None:
                order = order[np.isin(order, self.positions[shard], assume_unique=True)]
            return array("q", order.astype(np.int64).tobytes())

        return _kept(self._sample_orders, (number, shard), SAMPLE_ORDERS_KEPT, make)


@final
@dataclass(frozen=True)
class MixedLine:
    """Several endless rows merged evenly: each epoch takes counts[i] samples of row i and goes on there in the next one."""

    lines: tuple[ShardLine, ...]
    counts: tuple[int, ...]

    @cached_property
    def samples(self) -> int:
        """Samples of an epoch."""
        return sum(self.counts)

    def places(self, epoch: int, start: int, stop: int) -> list[Place]:
        """Samples start .. stop-1 of an epoch."""
        if len(self.lines) == 1:
            first = epoch * self.counts[0]
            return self.lines[0].places(first + start, first + stop)
        rows = [interleaved(number, self.counts) for number in range(start, stop)]
        taken = [
            iter(line.places(epoch * count + low, epoch * count + high))
            for line, count, low, high in zip(self.lines, self.counts, passed(start, self.counts), passed(stop, self.counts), strict=True)
        ]
        return [next(taken[row]) for row, _ in rows]

    def shards(self, epoch: int, start: int, stop: int, *, limit: int | None = None) -> list[int]:
        """The shards that samples start .. stop-1 of an epoch lie in, row by row; at most `limit` of each row."""
        spans = zip(self.lines, self.counts, passed(start, self.counts), passed(stop, self.counts), strict=True)
        return [shard for line, count, low, high in spans for shard in line.shards(epoch * count + low, epoch * count + high, limit=limit)]


def _kept(cache: MutableMapping[K, V], key: K, limit: int, make: Callable[[], V]) -> V:
    """cache[key], made when it is missing; the oldest entry goes when there are too many."""
    value = cache.get(key)
    if value is None:
        while len(cache) >= limit:
            cache.pop(next(iter(cache)))
        value = cache[key] = make()
    return value
