"""Reads micro-batches straight from the tars: a map-style dataset keyed by (step, index), so a loader keeps no state."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple, final
from zlib import crc32

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_shards.config import ATTRIBUTES_EXTENSION, CAPTION_EXTENSION, IMAGE_FORMATS, MAX_REPLACEMENTS, Field, OnBadSample
from data_shards.decode import attribute_strings, caption_text, images_tensor
from data_shards.images import DecodeError, image_pixels
from data_shards.index import Members, Shard, ShardIndex
from data_shards.plan import Plan
from data_shards.sample import BadSample, BadSampleError, MicroBatch
from data_shards.tar import BLOCK_BYTES, header_member, header_problem

OPEN_FILES = 256  # well under the usual limit of 1,024 a process
READ_AHEAD_BYTES = 2**28  # a shard up to this size is asked into the page cache when it is opened
BatchKey = tuple[int, int]  # step, index
Place = tuple[int, int]  # shard, position in it


@final
class SampleReader:
    """Parts of single samples by (shard, position); every byte is compared with the index before it is decoded.

    A copy sent to another process opens its own files.
    """

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.keys = [shard.keys for shard in index.shards]
        self._image_size = index.side()
        self._images = [_of(shard, IMAGE_FORMATS) for shard in index.shards]
        self._texts = [shard.members for shard in index.shards]
        self._files: dict[int, FileIO] = {}

    def __getstate__(self) -> dict[str, object]:
        """Everything but the open files."""
        return {**self.__dict__, "_files": {}}

    def is_open(self, shard: int) -> bool:
        """Whether the shard's tar is open."""
        return shard in self._files

    def open(self, shard: int) -> FileIO:
        """The shard's tar; when it is opened, its bytes are asked into the page cache.

        Raises: OSError if it can't be opened.
        """
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[shard] = FileIO(self.index.root / self.index.shards[shard].name)
            if self.index.shards[shard].size_bytes <= READ_AHEAD_BYTES:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def pixels(self, places: Sequence[Place]) -> list[bytes]:
        """The RGB bytes of each sample's image. Raises: DecodeError, OSError."""
        # All are read, then all decoded: by turns each would push the other's code and tables out of a busy core's cache.
        size = (self._image_size, self._image_size)
        return [image_pixels(content, extension, size=size) for content, extension in self._encoded(places)]

    def caption(self, shard: int, position: int) -> str | None:
        """A sample's caption, None if it has none. Raises: DecodeError, OSError."""
        members = self._texts[shard].get(CAPTION_EXTENSION)
        if members is None or members.sizes[position] < 0:
            return None
        return caption_text(self._content(shard, position, CAPTION_EXTENSION, members))

    def attributes(self, shard: int, position: int) -> Mapping[str, str]:
        """A sample's attributes, empty if it has none. Raises: DecodeError, OSError."""
        members = self._texts[shard].get(ATTRIBUTES_EXTENSION)
        if members is None or members.sizes[position] < 0:
            return {}
        return attribute_strings(self._content(shard, position, ATTRIBUTES_EXTENSION, members))

    def bad(self, shard: int, position: int, reason: str) -> BadSample:
        """The name of a sample that could not be read."""
        entry = self.index.shards[shard]
        offset = next((members.offsets[position] for _, members in self._images[shard] if members.sizes[position] >= 0), 0)
        return BadSample(entry.name, entry.keys[position], offset, reason)

    def _encoded(self, places: Sequence[Place]) -> list[tuple[bytes, str]]:
        """Each sample's image as it stands in its tar, checked like `_content` (and without its calls), with its extension."""
        encoded: list[tuple[bytes, str]] = []
        images, files = self._images, self._files
        for shard, position in places:
            for extension, members in images[shard]:
                size = members.sizes[position]
                if size < 0:
                    continue
                file = files.get(shard) or self.open(shard)
                block = os.pread(file.fileno(), _block_bytes(size), members.offsets[position] - BLOCK_BYTES)
                if crc32(block) != members.crc32[position]:
                    raise DecodeError(self._damage(block, shard, position, extension))
                encoded.append((block[BLOCK_BYTES : BLOCK_BYTES + size], extension))
                break
            else:
                raise DecodeError("it has no image")
        return encoded

    def _content(self, shard: int, position: int, extension: str, members: Members) -> bytes:
        """Data of one member, after its header, data and padding were compared with the index's crc32.

        Raises: DecodeError saying which of them is damaged; OSError.
        """
        size = members.sizes[position]
        block = os.pread(self.open(shard).fileno(), _block_bytes(size), members.offsets[position] - BLOCK_BYTES)
        if crc32(block) != members.crc32[position]:
            raise DecodeError(self._damage(block, shard, position, extension))
        return block[BLOCK_BYTES : BLOCK_BYTES + size]

    def _damage(self, block: bytes, shard: int, position: int, extension: str) -> str:
        """What differs between a member's bytes and what the index says of it."""
        entry = self.index.shards[shard]
        members, name = entry.members[extension], f"{entry.keys[position]}.{extension}"
        size, missing = members.sizes[position], _block_bytes(members.sizes[position]) - len(block)
        if missing > 0:
            return f"the shard is cut: it ends {missing} bytes before {name} does"
        header = block[:BLOCK_BYTES]
        problem = header_problem(header)
        if problem is not None:
            return f"its tar header is damaged: {problem}"
        found = header_member(header, members.offsets[position] - BLOCK_BYTES)
        if (found.name, found.size) != (name, size):
            return f"the tar holds {found.name!r} of {found.size} bytes here, the index says {name!r} of {size}"
        return f"the bytes of {name} do not match the crc32 in the index: they were changed after packing"


def _block_bytes(size: int) -> int:
    """Header, data and padding of a member."""
    return (size + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def _of(shard: Shard, extensions: Iterable[str]) -> tuple[tuple[str, Members], ...]:
    return tuple((extension, shard.members[extension]) for extension in extensions if extension in shard.members)


@final
class MicroBatches(Dataset[MicroBatch]):
    """Micro-batch (step, index) of a plan, for any step and index: `batches[step, index]`.

    on_bad_sample: "raise" ends with the sample's name; "skip" puts in another one by the plan's rule and reports it.
    fields: images always; "caption" and "attributes" where asked for. Raises: BadSampleError; ValueError if plan and index differ.
    """

    def __init__(
        self, index: ShardIndex, plan: Plan, *, on_bad_sample: OnBadSample = "raise", fields: Sequence[Field] = ("image",)
    ) -> None:
        if plan.samples_per_shard != index.samples_per_shard:
            raise ValueError("the plan was made for other shards than the index; build it from index.samples_per_shard")
        self.index = index
        self.plan = plan
        self._skip = on_bad_sample == "skip"
        self._reader = SampleReader(index)
        self._parts = _parts(self._reader, fields)

    def __getitem__(self, key: BatchKey) -> MicroBatch:
        """Reads, checks and decodes one micro-batch."""
        step, index = key
        places = self.plan.places(step, index)
        if not self._reader.is_open(places[-1][0]):
            self._open_ahead(step, index, places[-1][0])
        try:
            return self._batch(places, ())
        except (DecodeError, OSError):
            return self._batch(*self._mended(step, index, places))

    def _batch(self, places: Sequence[Place], replaced: tuple[BadSample, ...]) -> MicroBatch:
        return _batch(self._reader, self._parts, places, replaced)

    def _mended(self, step: int, index: int, places: Sequence[Place]) -> tuple[list[Place], tuple[BadSample, ...]]:
        """The places with good ones in the stead of bad ones, and the bad ones' names."""
        good: list[Place] = []
        replaced: list[BadSample] = []
        for position, place in enumerate(places):
            for attempt in range(MAX_REPLACEMENTS + 1):
                bad = _bad(self._reader, self._parts, place)
                if bad is None:
                    break
                if not self._skip or attempt == MAX_REPLACEMENTS:
                    raise BadSampleError(bad, _mend(self.index.root, "or set data.on_bad_sample=skip to go on without it"))
                replaced.append(bad)
                place = self.plan.replacement(step, index, position, attempt=attempt)
            good.append(place)
        return good, tuple(replaced)

    def _open_ahead(self, step: int, index: int, shard: int) -> None:
        """Opens the shard a lane comes to and the one after it, so that both are on their way into the page cache."""
        lane = self.plan.lane_shards(step // self.plan.steps_per_epoch, index)
        at = lane.index(shard)
        for ahead in lane[at : at + 2]:
            try:
                self._reader.open(ahead)
            except OSError:
                return  # reading its first sample names it, under the policy


def _leave_to_the_rank(_: int) -> None:
    """In a worker: signals are for the rank to answer, and a run's lock for the rank to hold."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    descriptor = os.environ.pop("HALFSTEP_LOCK_FD", None)
    if descriptor is not None:
        os.close(int(descriptor))


def loader(
    batches: MicroBatches, *, start_step: int, stop_step: int, indices: range, workers: int = 0, pin: bool = False
) -> Iterator[MicroBatch]:
    """Micro-batches of steps start_step .. stop_step-1, for each the given indices, in that order.

    workers: processes that read ahead (0 reads in this one). Starting at any step costs the same.
    Raises: BadSampleError when it comes to a bad sample under the policy `raise`.
    """
    order = _Order(start_step, stop_step, indices)
    if workers == 0:
        for key in order:
            batch = batches[key]
            yield batch.pin_memory() if pin else batch
        return
    ahead: DataLoader[MicroBatch | BadSampleError] = DataLoader(
        _Delivered(batches),
        sampler=order,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4,
        worker_init_fn=_leave_to_the_rank,
        generator=torch.Generator(),  # else a DataLoader draws its base seed from the global one
    )
    for delivered in ahead:
        if isinstance(delivered, BadSampleError):
            raise delivered
        yield delivered


def read_all(index: ShardIndex, fields: Sequence[Field] = ("image",), *, limit: int | None = None) -> MicroBatch:
    """The first `limit` samples (all by default) in the order of the index, as one batch in memory.

    Raises: BadSampleError at the first bad sample.
    """
    reader = SampleReader(index)
    parts = _parts(reader, fields)
    places = [(shard, position) for shard, count in enumerate(index.samples_per_shard) for position in range(count)][:limit]
    try:
        return _batch(reader, parts, places, ())
    except (DecodeError, OSError):
        bad = next(bad for place in places if (bad := _bad(reader, parts, place)) is not None)
        raise BadSampleError(bad, _mend(index.root)) from None


class _Parts(NamedTuple):
    """The texts to read of each sample; None for what was not asked for."""

    caption: Callable[[int, int], str | None] | None
    attributes: Callable[[int, int], Mapping[str, str]] | None


def _parts(reader: SampleReader, fields: Sequence[Field]) -> _Parts:
    return _Parts(reader.caption if "caption" in fields else None, reader.attributes if "attributes" in fields else None)


def _batch(reader: SampleReader, parts: _Parts, places: Sequence[Place], replaced: tuple[BadSample, ...]) -> MicroBatch:
    """Reads all places as one batch. Raises: DecodeError or OSError at the first bad one."""
    keys = reader.keys
    return MicroBatch(
        images=images_tensor(reader.pixels(places), image_size=reader.index.side()),
        keys=tuple([keys[shard][position] for shard, position in places]),
        captions=tuple([parts.caption(*place) for place in places]) if parts.caption is not None else (),
        attributes=tuple([parts.attributes(*place) for place in places]) if parts.attributes is not None else (),
        replaced=replaced,
    )


def _bad(reader: SampleReader, parts: _Parts, place: Place) -> BadSample | None:
    """The name of the sample at this place if it can't be read, else None."""
    try:
        _batch(reader, parts, [place], ())
    except (DecodeError, OSError) as error:
        return reader.bad(*place, str(error))
    return None


def _mend(root: Path, *others: str) -> str:
    return ", ".join((f"see `halfstep shards verify {root}`", "pack again into a new folder", *others))


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
class _Delivered(Dataset[MicroBatch | BadSampleError]):
    """Hands a worker's error over as a value: a DataLoader would bury its message in a traceback."""

    def __init__(self, batches: MicroBatches) -> None:
        self._batches = batches

    def __getitem__(self, key: BatchKey) -> MicroBatch | BadSampleError:
        try:
            return self._batches[key]
        except BadSampleError as error:
            return error
