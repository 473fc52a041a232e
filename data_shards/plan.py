"""The pure order of training data: which samples make up micro-batch (step, index)."""

from __future__ import annotations  # array[int] is subscriptable from 3.12 on

from array import array
from bisect import bisect_right
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TypeVar, final

import numpy as np
from jaxtyping import Int64

from data_shards.keyed import permutation, random_bits

# Entries kept of pure functions: shard orders by epoch, and as many sample orders as one process is likely to have lanes.
EPOCHS_KEPT = 2
SAMPLE_ORDERS_KEPT = 256
K = TypeVar("K")
V = TypeVar("V")


@final
@dataclass(frozen=True)
class SampleRefs:
    """The samples of one micro-batch: for each its shard and its position in that shard."""

    shards: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]


@final
@dataclass(frozen=True)
class Plan:
    """Order of all epochs as a function of (samples_per_shard, seed, batch sizes) alone: no state, no cursor.

    An epoch lays the shards end to end in an order drawn for it, each with its samples in an order drawn for it, and cuts
    that line into one lane a micro-batch index. So every sample comes once an epoch, all but a remainder under one global
    batch; the world size changes nothing; and a lane runs through its shards in sequence.
    Raises: ValueError if a size does not divide, a shard is empty, or the shards hold less than one global batch.
    """

    samples_per_shard: tuple[int, ...]
    seed: int
    global_batch_size: int
    micro_batch_size: int
    _shard_orders: dict[int, tuple[list[int], list[int]]] = field(init=False, repr=False, compare=False, default_factory=dict)
    _sample_orders: dict[tuple[int, int], array[int]] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        if self.micro_batch_size < 1 or self.global_batch_size % self.micro_batch_size or self.global_batch_size < 1:
            raise ValueError(
                f"global_batch_size={self.global_batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}; "
                "set data.global_batch_size to one"
            )
        empty = [shard for shard, samples in enumerate(self.samples_per_shard) if samples < 1]
        if empty:
            raise ValueError(f"shard {empty[0]} of {len(self.samples_per_shard)} is empty; pack the shards again")
        if self.steps_per_epoch < 1:
            raise ValueError(
                f"the shards hold {self.samples} samples, less than one global batch of {self.global_batch_size}; "
                "pack more samples or lower data.global_batch_size"
            )

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.samples_per_shard)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in which each sample is used once, but for the remainder."""
        return self.samples // self.global_batch_size

    @cached_property
    def micro_batches(self) -> int:
        """Micro-batches in one optimizer step, which is the number of lanes."""
        return self.global_batch_size // self.micro_batch_size

    @cached_property
    def lane_samples(self) -> int:
        """Samples that one micro-batch index uses in an epoch."""
        return self.steps_per_epoch * self.micro_batch_size

    def micro_batch(self, step: int, index: int) -> SampleRefs:
        """Samples of micro-batch `index` (0 .. micro_batches - 1) of optimizer step `step` (from 0, over all epochs).

        Raises: IndexError if either is out of range.
        """
        shards, positions = np.asarray(self.places(step, index), dtype=np.int64).T
        return SampleRefs(shards, positions)

    def places(self, step: int, index: int) -> list[tuple[int, int]]:
        """The same as (shard, position) pairs, which is what a reader wants.

        Raises: IndexError if step or index is out of range.
        """
        if step < 0 or not 0 <= index < self.micro_batches:
            raise IndexError(f"no micro-batch (step={step}, index={index}): step >= 0 and 0 <= index < {self.micro_batches}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        at = index * self.lane_samples + step_in_epoch * self.micro_batch_size
        end = at + self.micro_batch_size
        order, ends = self._shard_order(epoch)
        number = bisect_right(ends, at)
        places: list[tuple[int, int]] = []
        while at < end:
            shard, shard_end = order[number], ends[number]
            start = shard_end - self.samples_per_shard[shard]
            taken = self._sample_order(epoch, shard)[at - start : min(end, shard_end) - start]
            places += [(shard, position) for position in taken]
            at, number = at + len(taken), number + 1
        return places

    def replacement(self, step: int, index: int, position: int, *, attempt: int) -> tuple[int, int]:
        """Shard and position of the sample that stands in for a bad one at (step, index, position in the micro-batch).

        attempt: from 0, counts replacements that were bad themselves. The same on every rank and every resume.
        """
        drawn = int(random_bits(1, self.seed, "replacement", step, index, position, attempt)[0] % self.samples)
        shard = bisect_right(self._ends, drawn)
        return shard, drawn - self._ends[shard] + self.samples_per_shard[shard]

    def lane_shards(self, epoch: int, index: int) -> tuple[int, ...]:
        """Shards that lane `index` reads in this epoch, in the order it reads them."""
        order, ends = self._shard_order(epoch)
        first = index * self.lane_samples
        return tuple(order[bisect_right(ends, first) : bisect_right(ends, first + self.lane_samples - 1) + 1])

    @cached_property
    def _ends(self) -> list[int]:
        """Where each shard ends when they are laid end to end in their own order."""
        return list(accumulate(self.samples_per_shard))

    def _shard_order(self, epoch: int) -> tuple[list[int], list[int]]:
        """Shards in this epoch's order, and where on the epoch's line each ends."""

        def make() -> tuple[list[int], list[int]]:
            order = permutation(len(self.samples_per_shard), self.seed, "shards", epoch).tolist()
            return order, list(accumulate(self.samples_per_shard[shard] for shard in order))

        return _kept(self._shard_orders, epoch, EPOCHS_KEPT, make)

    def _sample_order(self, epoch: int, shard: int) -> array[int]:
        """Positions of one shard's samples in this epoch's order."""

        def make() -> array[int]:
            return array("q", permutation(self.samples_per_shard[shard], self.seed, "samples", epoch, shard).tobytes())

        return _kept(self._sample_orders, (epoch, shard), SAMPLE_ORDERS_KEPT, make)


def _kept(cache: MutableMapping[K, V], key: K, limit: int, make: Callable[[], V]) -> V:
    """cache[key], made when it is missing; the oldest entry goes when there are too many."""
    value = cache.get(key)
    if value is None:
        while len(cache) >= limit:
            cache.pop(next(iter(cache)))
        value = cache[key] = make()
    return value
