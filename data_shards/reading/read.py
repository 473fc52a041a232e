"""Reads micro-batches straight from the tars: a map-style dataset keyed by (step, index), so a loader keeps no state."""

import atexit
import os
import signal
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data_shards.config import MASK_EXTENSION, MAX_REPLACEMENTS, TENSOR_EXTENSION, Field, OnBadSample
from data_shards.images import DecodeError
from data_shards.index import ShardIndex
from data_shards.reading.lines import Place
from data_shards.reading.plan import Plan
from data_shards.reading.ring import Ring
from data_shards.reading.sample import BadSample, BadSampleError, MicroBatch
from data_shards.reading.sample_reader import SampleReader
from data_shards.remote.retry import FetchError
from data_shards.remote.store import Store

BatchKey = tuple[int, int]  # step, index
AHEAD = 4  # micro-batches that a worker may be asked for before they are needed
HELD = 3  # that who reads may hold meanwhile before others are copied for it: the last one, this one and one more
_NOTHING = torch.empty(0, dtype=torch.uint8)
ReadError = BadSampleError | FetchError


@final
class MicroBatches(Dataset[MicroBatch]):
    """Micro-batch (step, index) of a plan, for any step and index: `batches[step, index]`.

    indexes: the data sets that the plan was made for. on_bad_sample: "raise" ends with the sample's name; "skip" puts in another one by
    the plan's rule and reports it. fields: "image", "caption", "attributes", "mask.png", or a tensor's extension. sizes: width and
    height in pixels that the images of each of the plan's buckets are brought to; None leaves them as they are stored.
    Raises: BadSampleError; FetchError if a remote store can't be reached; ValueError if plan and indexes differ.
    """

    def __init__(
        self,
        indexes: ShardIndex | Sequence[ShardIndex],
        plan: Plan,
        *,
        on_bad_sample: OnBadSample = "raise",
        fields: Sequence[Field] = ("image",),
        sizes: Sequence[tuple[int, int]] | None = None,
        stores: Sequence[Store] | None = None,
    ) -> None:
        self._reader = SampleReader(indexes, stores=stores)
        if plan.samples_per_shard != tuple(shard.samples for shard in self._reader.shards):
            raise ValueError("the plan was made for other shards than the index; build it from index.samples_per_shard")
        self.plan = plan
        self._skip = on_bad_sample == "skip"
        self._parts = _parts(self._reader, fields)
        self._sizes = sizes
        self._coming: dict[int, tuple[int, ...]] = {}
        self._between: set[int] = set()

    @property
    def most_bytes(self) -> int:
        """Of the pixels of a micro-batch. Raises: ShardIndexError as reading it does."""
        if not self._parts.images:
            return 0
        side = self._reader.indexes[0].side() if self._sizes is None else 0
        return self.plan.micro_batch_size * 3 * max(width * height for width, height in self._sizes or [(side, side)])

    def __getitem__(self, key: BatchKey) -> MicroBatch:
        """Reads, checks and decodes one micro-batch."""
        return self.read(key)

    def read(self, key: BatchKey, memory: UInt8[Tensor, " n"] | None = None) -> MicroBatch:
        """The same; memory: where its pixels are put, at least `most_bytes`."""
        step, index = key
        places = self.plan.places(step, index)
        size = None if self._sizes is None else self._sizes[self.plan.bucket(step, index)]
        if index in self._between or not self._reader.are_open(places):
            self._go_on(step, index, places)
        try:
            return _batch(self._reader, self._parts, places, size, (), memory)
        except (DecodeError, OSError):
            good, replaced = self._mended(step, index, places, size)
            return _batch(self._reader, self._parts, good, size, replaced, memory)

    def _mended(
        self, step: int, index: int, places: Sequence[Place], size: tuple[int, int] | None
    ) -> tuple[list[Place], tuple[BadSample, ...]]:
        """The places with good ones in the stead of bad ones, and the bad ones' names."""
        good: list[Place] = []
        replaced: list[BadSample] = []
        for position, place in enumerate(places):
            for attempt in range(MAX_REPLACEMENTS + 1):
                bad = _bad(self._reader, self._parts, place, size)
                if bad is None:
                    break
                if not self._skip or attempt == MAX_REPLACEMENTS:
                    raise BadSampleError(bad, _mend(self._reader.indexes, "or set data.on_bad_sample=skip to go on without it"))
                replaced.append(bad)
                place = self.plan.replacement(step, index, position, attempt=attempt)
            good.append(place)
        return good, tuple(replaced)

    def _go_on(self, step: int, index: int, places: Sequence[Place]) -> None:
        """A lane comes to another shard: lets go of those that none needs any more, opens this one and has the next one brought near."""
        self._coming[index] = self.plan.coming(step, index)
        self._reader.keep({shard for coming in self._coming.values() for shard in coming})
        now = dict.fromkeys(shard for shard, _ in places)
        try:
            for shard in now:
                self._reader.open(shard)
        except (DecodeError, OSError):
            return  # reading its first sample names it, under the policy
        if len(now) > 1 and index not in self._between:
            self._between.add(index)  # the next one has to wait until this micro-batch's first shard makes room for it
            return
        self._between.discard(index)
        for shard in self._coming[index]:
            if shard not in now:
                self._reader.prefetch(shard)


def _leave_to_the_rank(_: int) -> None:
    """In a worker: signals are for the rank to answer, and a run's lock for the rank to hold."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    descriptor = os.environ.pop("HALFSTEP_LOCK_FD", None)
    if descriptor is not None:
        os.close(int(descriptor))


def loader(
    batches: MicroBatches, *, start_step: int, stop_step: int, indices: range, workers: int = 0, pin: bool = False
) -> Generator[MicroBatch, None, None]:
    """Micro-batches of steps start_step .. stop_step-1, for each the given indices, in that order.

    workers: processes that read ahead (0 reads in this one). Starting at any step costs the same.
    Raises: BadSampleError when it comes to a bad sample under the policy `raise`.
    """
    order = _Order(start_step, stop_step, indices)
    if workers == 0:
        return _read_here(batches, order, pin=pin)
    read = _read_ahead(batches, order, workers, pin=pin)
    # The interpreter's end would wait for workers, which leave to the rank the signal that it sends them.
    atexit.register(_close, weakref.ref(read))
    return read


def _read_here(batches: MicroBatches, order: "_Order", *, pin: bool) -> Generator[MicroBatch, None, None]:
    for key in order:
        batch = batches[key]
        yield batch.pin_memory() if pin else batch


def _read_ahead(batches: MicroBatches, order: "_Order", workers: int, *, pin: bool) -> Generator[MicroBatch, None, None]:
    ring = Ring(slots=workers * AHEAD + HELD, slot_bytes=batches.most_bytes)
    ahead: DataLoader[_Placed | ReadError] = DataLoader(
        _Delivered(batches, ring),
        sampler=_Tasks(order, ring),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=AHEAD,
        worker_init_fn=_leave_to_the_rank,
        generator=torch.Generator(),  # else a DataLoader draws its base seed from the global one
    )
    for delivered in ahead:
        if isinstance(delivered, BadSampleError | FetchError):
            raise delivered
        yield _taken(delivered, ring, pin=pin)


def _close(read: "weakref.ref[Generator[MicroBatch, None, None]]") -> None:
    still = read()
    if still is not None:
        still.close()


def read_all(index: ShardIndex, fields: Sequence[Field] = ("image",), *, limit: int | None = None) -> MicroBatch:
    """The first `limit` samples (all by default) in the order of the index, as one batch in memory.

    Raises: BadSampleError at the first bad sample.
    """
    reader = SampleReader(index)
    parts = _parts(reader, fields)
    places = [(shard, position) for shard, count in enumerate(index.samples_per_shard) for position in range(count)][:limit]
    try:
        batch = _batch(reader, parts, places, None, ())
        return replace(batch, images=batch.images.contiguous())  # read once, used often
    except (DecodeError, OSError):
        bad = next(bad for place in places if (bad := _bad(reader, parts, place, None)) is not None)
        raise BadSampleError(bad, _mend([index])) from None


class _Parts(NamedTuple):
    """What to read of each sample; None and nothing for what was not asked for."""

    images: bool
    caption: Callable[[int, int], str | None] | None
    attributes: Callable[[int, int], Mapping[str, str]] | None
    tensors: tuple[str, ...]


def _parts(reader: SampleReader, fields: Sequence[Field]) -> _Parts:
    tensors = tuple(name for name in fields if name.endswith(TENSOR_EXTENSION) or name == MASK_EXTENSION)
    missing = [name for name in tensors if not all(name in shard.members for shard in reader.shards)]
    if missing:
        roots = ", ".join(str(index.root) for index in reader.indexes)
        mend = (
            "pack images that have a NAME.mask.png beside them" if missing[0] == MASK_EXTENSION else "make it with `halfstep shards encode`"
        )
        raise ValueError(f"{roots}: holds no {missing[0]}; {mend}")
    return _Parts(
        "image" in fields,
        reader.caption if "caption" in fields else None,
        reader.attributes if "attributes" in fields else None,
        tensors,
    )


def _batch(
    reader: SampleReader,
    parts: _Parts,
    places: Sequence[Place],
    size: tuple[int, int] | None,
    replaced: tuple[BadSample, ...],
    memory: UInt8[Tensor, " n"] | None = None,
) -> MicroBatch:
    """Reads all places as one batch. Raises: DecodeError or OSError at the first bad one."""
    keys = reader.keys
    return MicroBatch(
        images=reader.images(places, size, memory) if parts.images else torch.empty((len(places), 3, 0, 0), dtype=torch.uint8),
        keys=tuple([keys[shard][position] for shard, position in places]),
        captions=tuple([parts.caption(*place) for place in places]) if parts.caption is not None else (),
        attributes=tuple([parts.attributes(*place) for place in places]) if parts.attributes is not None else (),
        tensors={name: reader.masks(places, size) if name == MASK_EXTENSION else reader.tensors(places, name) for name in parts.tensors},
        replaced=replaced,
    )


def _bad(reader: SampleReader, parts: _Parts, place: Place, size: tuple[int, int] | None) -> BadSample | None:
    """The name of the sample at this place if it can't be read, else None."""
    try:
        _batch(reader, parts, [place], size, ())
    except (DecodeError, OSError) as error:
        return reader.bad(*place, str(error))
    return None


def _mend(indexes: Sequence[ShardIndex], *others: str) -> str:
    roots = " or ".join(str(index.root) for index in indexes)
    return ", ".join((f"see `halfstep shards verify {roots}`", "pack again into a new folder", *others))


@final
class _Order(Sampler[BatchKey]):
    """(step, index) in the order of training."""

    def __init__(self, start_step: int, stop_step: int, indices: range) -> None:
        self._steps = range(start_step, stop_step)
        self._indices = indices

    def __iter__(self) -> Iterator[BatchKey]:
        return ((step, index) for step in self._steps for index in self._indices)

    def __len__(self) -> int:
        return len(self._steps) * len(self._indices)


@final
class _Tasks(Sampler[tuple[BatchKey, int | None]]):
    """What workers are asked for: a micro-batch, and the slot to put it into as long as there is one."""

    def __init__(self, order: _Order, ring: Ring) -> None:
        self._order = order
        self._ring = ring

    def __iter__(self) -> Iterator[tuple[BatchKey, int | None]]:
        return ((key, self._ring.take()) for key in self._order)

    def __len__(self) -> int:
        return len(self._order)


@final
@dataclass(frozen=True)
class _Placed:
    """A micro-batch whose images, of this shape, lie in a slot of the ring if there is one."""

    batch: MicroBatch
    shape: torch.Size
    slot: int | None


@final
class _Delivered(Dataset[_Placed | ReadError]):
    """In a worker: decodes into the ring, which is quicker than handing tensors over for small batches and for large ones.

    An error is handed over as a value: a DataLoader would bury its message in a traceback.
    """

    def __init__(self, batches: MicroBatches, ring: Ring) -> None:
        self._batches = batches
        self._ring = ring

    def __getitem__(self, task: tuple[BatchKey, int | None]) -> _Placed | ReadError:
        key, slot = task
        try:
            batch = self._batches.read(key, None if slot is None else self._ring.memory(slot))
        except (BadSampleError, FetchError) as error:
            return error
        return _Placed(batch if slot is None else replace(batch, images=_NOTHING), batch.images.shape, slot)


def _taken(placed: _Placed, ring: Ring, *, pin: bool) -> MicroBatch:
    """The micro-batch with its images where they were decoded, or in page-locked memory."""
    batch = placed.batch
    if placed.slot is not None:
        count, channels, height, width = placed.shape
        images = ring.lend(placed.slot, placed.shape.numel()).view(count, height, width, channels).permute(0, 3, 1, 2)
        batch = replace(batch, images=images)
    return batch.pin_memory() if pin else batch
