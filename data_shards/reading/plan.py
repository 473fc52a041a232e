"""The pure order of training data: which samples make up micro-batch (step, index)."""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from itertools import accumulate
from math import lcm
from typing import final

import numpy as np
from jaxtyping import Int64

from data_shards.keyed import random_bits
from data_shards.reading.lines import MixedLine, Place, ShardLine, apportioned, interleaved, passed


@final
@dataclass(frozen=True)
class SampleRefs:
    """The samples of one micro-batch: for each its shard and its position in that shard."""

    shards: Int64[np.ndarray, " b"]
    positions: Int64[np.ndarray, " b"]


@final
@dataclass(frozen=True)
class Plan:
    """Order of all epochs as a function of its arguments alone: no state, no cursor.

    An epoch lays the shards end to end in an order drawn for it, each with its samples in an order drawn for it, cuts that line into
    micro-batches and deals those out in one lane a micro-batch index. So every sample comes once an epoch, all but a remainder under
    one global batch; the world size changes nothing; and a lane runs through its shards in sequence.

    shards_per_set: the shards belong to several data sets, which are mixed evenly. weights: in this proportion, then a set may come more
    or less than once an epoch and goes on in the next where it was; without them in proportion to their samples. buckets: for each
    shard the bucket of each sample; a micro-batch is of one bucket, and under one micro-batch a bucket is left over too.
    Raises: ValueError if a size does not divide, a shard is empty, or the shards hold less than one global batch.
    """

    samples_per_shard: tuple[int, ...]
    seed: int
    global_batch_size: int
    micro_batch_size: int
    shards_per_set: tuple[int, ...] | None = None
    weights: tuple[float, ...] | None = None
    buckets: tuple[np.ndarray, ...] | None = None

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
            by_bucket = "" if self.buckets is None else f" in micro-batches of one of {len(self._lines)} buckets each"
            raise ValueError(
                f"the shards hold {self.samples} samples, less than one global batch of {self.global_batch_size}{by_bucket}; "
                "pack more samples or lower data.global_batch_size"
            )

    @cached_property
    def samples(self) -> int:
        """Number of samples in all shards."""
        return sum(self.samples_per_shard)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return sum(self._batches) // self.micro_batches

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

    def places(self, step: int, index: int) -> list[Place]:
        """The same as (shard, position) pairs, which is what a reader wants.

        Raises: IndexError if step or index is out of range.
        """
        epoch, number = self._turn(step, index)
        bucket, batch = interleaved(number, self._batches)
        start = batch * self.micro_batch_size
        return self._lines[bucket].places(epoch, start, start + self.micro_batch_size)

    def bucket(self, step: int, index: int) -> int:
        """The bucket that micro-batch (step, index) is of; 0 without buckets. Raises: IndexError as `places`."""
        return interleaved(self._turn(step, index)[1], self._batches)[0]

    def replacement(self, step: int, index: int, position: int, *, attempt: int) -> Place:
        """Shard and position of the sample that stands in for a bad one at (step, index, position in the micro-batch).

        attempt: from 0, counts replacements that were bad themselves. Of the same bucket; the same on every rank and every resume.
        """
        ends, positions = self._by_bucket[self.bucket(step, index)]
        drawn = int(random_bits(1, self.seed, "replacement", step, index, position, attempt)[0] % ends[-1])
        shard = bisect_right(ends, drawn)
        inside = drawn - (ends[shard - 1] if shard else 0)
        return shard, inside if positions is None else int(positions[shard][inside])

    def lane_shards(self, epoch: int, index: int) -> tuple[int, ...]:
        """Shards that lane `index` reads in this epoch, in the order it reads them (data set by data set, bucket by bucket)."""
        first, last = index * self.steps_per_epoch, (index + 1) * self.steps_per_epoch
        return tuple(self._spans(epoch, first, last, None))

    def coming(self, step: int, index: int) -> tuple[int, ...]:
        """Shards that lane `index` reads from `step` on: those of this micro-batch, then the one that follows in each line."""
        epoch, number = self._turn(step, index)
        now = dict.fromkeys(shard for shard, _ in self.places(step, index))
        return tuple(now | dict.fromkeys(self._spans(epoch, number, (index + 1) * self.steps_per_epoch, len(now) + 1)))

    def _spans(self, epoch: int, first: int, last: int, limit: int | None) -> list[int]:
        """The shards of micro-batches first .. last-1 of an epoch, line by line, at most `limit` of each."""
        size = self.micro_batch_size
        spans = zip(self._lines, passed(first, self._batches), passed(last, self._batches), strict=True)
        return [shard for line, low, high in spans for shard in line.shards(epoch, low * size, high * size, limit=limit)]

    def _turn(self, step: int, index: int) -> tuple[int, int]:
        """The epoch of (step, index), and which of its micro-batches it is."""
        if step < 0 or not 0 <= index < self.micro_batches:
            raise IndexError(f"no micro-batch (step={step}, index={index}): step >= 0 and 0 <= index < {self.micro_batches}")
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        return epoch, index * self.steps_per_epoch + step_in_epoch

    @cached_property
    def _sets(self) -> tuple[range, ...]:
        """The shards of each data set."""
        ends = list(accumulate(self.shards_per_set or (len(self.samples_per_shard),)))
        return tuple(range(start, end) for start, end in zip([0, *ends], ends, strict=False))

    @cached_property
    def _batches(self) -> tuple[int, ...]:
        """Micro-batches of each line in an epoch."""
        return tuple(line.samples // self.micro_batch_size for line in self._lines)

    @cached_property
    def _lines(self) -> tuple[MixedLine, ...]:
        """One line a bucket, in which the data sets are mixed."""
        if self.buckets is None:
            cells = [[self._line(number, None) for number in range(len(self._sets))]]
        else:
            buckets = 1 + max(int(of_shard.max()) for of_shard in self.buckets)
            cells = [[self._line(number, bucket) for number in range(len(self._sets))] for bucket in range(buckets)]
        counts = self._counts([[line.samples for line in row] for row in cells])
        mixed: list[MixedLine] = []
        for row, of_row in zip(cells, counts, strict=True):
            used = [at for at, count in enumerate(of_row) if count] or [0]
            mixed.append(MixedLine(tuple(row[at] for at in used), tuple(of_row[at] for at in used)))
        return tuple(mixed)

    def _line(self, number: int, bucket: int | None) -> ShardLine:
        """The samples of one data set, or those of them in one bucket."""
        shards = self._sets[number]
        samples = self.samples_per_shard[shards.start : shards.stop]
        path = (number,) if len(self._sets) > 1 else ()
        if bucket is None or self.buckets is None:
            return ShardLine(samples, shards.start, self.seed, path)
        positions = tuple(np.flatnonzero(self.buckets[shard] == bucket) for shard in shards)
        counts = tuple(len(inside) for inside in positions)
        return ShardLine(counts, shards.start, self.seed, path, samples_per_shard=samples, positions=positions)

    def _counts(self, samples: Sequence[Sequence[int]]) -> list[list[int]]:
        """How many samples of each (bucket, data set) an epoch takes, of so many that there are."""
        if self.weights is None:
            return [list(row) for row in samples]
        epoch = self.samples // self.global_batch_size * self.global_batch_size
        sets = [sum(row[number] for row in samples) for number in range(len(self._sets))]
        shares = [Fraction(weight) / count for weight, count in zip(self.weights, sets, strict=True)]
        cells = [share * count for row in samples for share, count in zip(shares, row, strict=True)]
        scale = lcm(*(cell.denominator for cell in cells))
        counts = iter(apportioned(epoch, [int(cell * scale) for cell in cells]))
        return [[next(counts) for _ in row] for row in samples]

    @cached_property
    def _by_bucket(self) -> list[tuple[list[int], tuple[np.ndarray, ...] | None]]:
        """For each bucket: where its samples of each shard end when they are counted through, and which they are."""
        if self.buckets is None:
            return [(list(accumulate(self.samples_per_shard)), None)]
        found = []
        for bucket in range(len(self._lines)):
            positions = tuple(np.flatnonzero(of_shard == bucket) for of_shard in self.buckets)
            found.append((list(accumulate(len(inside) for inside in positions)), positions))
        return found
