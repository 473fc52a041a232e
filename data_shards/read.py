"""Reads micro-batches straight from the tars: a map-style dataset keyed by (step, index), so a loader keeps no state."""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import final

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from data_shards.config import ATTRIBUTES_EXTENSION, CAPTION_EXTENSION, IMAGE_FORMATS, MAX_REPLACEMENTS, Field, OnBadSample
from data_shards.decode import DecodeError, attribute_strings, caption_text, image_pixels, images_tensor
from data_shards.index import Members, Shard, ShardIndex
from data_shards.plan import Plan
from data_shards.sample import BadSample, BadSampleError, MicroBatch
from data_shards.tar import BLOCK_BYTES, header_member, header_problem, padded

OPEN_FILES = 256  # well under the usual limit of 1,024 a process
READ_AHEAD_BYTES = 2**28  # a shard up to this size is asked into the page cache when it is opened
BatchKey = tuple[int, int]


@final
@dataclass(frozen=True)
class DecodedSample:
    """One sample: size x size x 3 bytes, key, and the texts that were asked for."""

    pixels: bytes
    key: str
    caption: str | None
    attributes: dict[str, str]


@final
class ShardFiles:
    """Open tars, by shard number; a copy sent to another process opens its own."""

    def __init__(self, root: Path, shards: Sequence[Shard]) -> None:
        self._paths = [root / shard.name for shard in shards]
        self._sizes = [shard.size_bytes for shard in shards]
        self._files: dict[int, FileIO] = {}

    def __getstate__(self) -> dict[str, object]:
        """Everything but the open files."""
        return {**self.__dict__, "_files": {}}

    def __contains__(self, shard: int) -> bool:
        """Whether a shard is open."""
        return shard in self._files

    def open(self, shard: int) -> FileIO:
        """The tar of a shard; opened now, its bytes are asked into the page cache.

        Raises: OSError if it can't be opened.
        """
        file = self._files.get(shard)
        if file is None:
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            file = self._files[shard] = FileIO(self._paths[shard])
            if self._sizes[shard] <= READ_AHEAD_BYTES:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file


@final
class SampleReader:
    """Single samples by (shard, position), each byte compared with the index before it is decoded."""

    def __init__(self, index: ShardIndex, fields: Sequence[Field]) -> None:
        self.index = index
        self.files = ShardFiles(index.root, index.shards)
        self._images = [[(name, shard.members[name]) for name in IMAGE_FORMATS if name in shard.members] for shard in index.shards]
        self._captions = [shard.members.get(CAPTION_EXTENSION) if "caption" in fields else None for shard in index.shards]
        self._attributes = [shard.members.get(ATTRIBUTES_EXTENSION) if "attributes" in fields else None for shard in index.shards]

    def read(self, shard: int, position: int) -> DecodedSample | BadSample:
        """The sample, or its name and what is wrong with it; never raises for what lies in a shard."""
        key, offset = self.index.shards[shard].keys[position], 0
        caption: str | None = None
        attributes: dict[str, str] = {}
        try:
            file = self.files.open(shard)
            extension, members = self._image(shard, position)
            offset = members.offsets[position]
            pixels = image_pixels(_member(file, members, position, key, extension), extension, image_size=self.index.image_size)
            members = self._captions[shard]
            if members is not None and members.sizes[position] >= 0:
                offset = members.offsets[position]
                caption = caption_text(_member(file, members, position, key, CAPTION_EXTENSION))
            members = self._attributes[shard]
            if members is not None and members.sizes[position] >= 0:
                offset = members.offsets[position]
                attributes = attribute_strings(_member(file, members, position, key, ATTRIBUTES_EXTENSION))
        except (DecodeError, OSError) as error:
            return BadSample(self.index.shards[shard].name, key, offset, str(error))
        return DecodedSample(pixels, key, caption, attributes)

    def _image(self, shard: int, position: int) -> tuple[str, Members]:
        for extension, members in self._images[shard]:
            if members.sizes[position] >= 0:
                return extension, members
        raise DecodeError("it has no image")


def _member(file: FileIO, members: Members, position: int, key: str, extension: str) -> bytes:
    """Data of one member, after its header, data and padding were compared with the index's crc32.

    Raises: DecodeError saying which of them is damaged.
    """
    offset, size = members.offsets[position], members.sizes[position]
    block = os.pread(file.fileno(), BLOCK_BYTES + padded(size), offset - BLOCK_BYTES)
    if zlib.crc32(block) != members.crc32[position]:
        raise DecodeError(_damage(block, offset, size, f"{key}.{extension}"))
    return block[BLOCK_BYTES : BLOCK_BYTES + size]


def _damage(block: bytes, offset: int, size: int, name: str) -> str:
    """What differs between a member's bytes and what the index says of it."""
    if len(block) < BLOCK_BYTES + padded(size):
        return f"the shard is cut: it ends {BLOCK_BYTES + padded(size) - len(block)} bytes before this member does"
    header = block[:BLOCK_BYTES]
    problem = header_problem(header)
    if problem is not None:
        return f"its tar header is damaged: {problem}"
    found = header_member(header, offset - BLOCK_BYTES)
    if (found.name, found.size) != (name, size):
        return f"the tar holds {found.name!r} of {found.size} bytes here, the index says {name!r} of {size}"
    return f"the bytes of {name} do not match the crc32 in the index: they were changed after packing"


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
        self.fields = tuple(fields)
        self._skip = on_bad_sample == "skip"
        self._reader = SampleReader(index, fields)

    def __getitem__(self, key: BatchKey) -> MicroBatch:
        """Reads, checks and decodes one micro-batch."""
        step, index = key
        refs = self.plan.micro_batch(step, index)
        shards = refs.shards.tolist()
        if shards[-1] not in self._reader.files:
            self._open_ahead(step, index, shards[-1])
        samples: list[DecodedSample] = []
        replaced: list[BadSample] = []
        for position, (shard, at) in enumerate(zip(shards, refs.positions.tolist(), strict=True)):
            sample = self._reader.read(shard, at)
            if isinstance(sample, BadSample):
                sample = self._replacement(sample, step, index, position, replaced)
            samples.append(sample)
        return _batch(samples, self.index.image_size, self.fields, tuple(replaced))

    def _replacement(self, bad: BadSample, step: int, index: int, position: int, replaced: list[BadSample]) -> DecodedSample:
        """The sample that stands in for a bad one; appends every bad one met to `replaced`."""
        for attempt in range(MAX_REPLACEMENTS):
            if not self._skip:
                break
            replaced.append(bad)
            sample = self._reader.read(*self.plan.replacement(step, index, position, attempt=attempt))
            if not isinstance(sample, BadSample):
                return sample
            bad = sample
        root = self.index.root
        raise BadSampleError(bad, f"see `halfstep shards verify {root}`, pack again, or set data.on_bad_sample=skip to go on without it")

    def _open_ahead(self, step: int, index: int, shard: int) -> None:
        """Opens the shard a lane comes to and the one after it, so that both are on their way into the page cache."""
        lane = self.plan.lane_shards(step // self.plan.steps_per_epoch, index)
        at = lane.index(shard)
        for ahead in lane[at : at + 2]:
            try:
                self._reader.files.open(ahead)
            except OSError:
                return  # reading its first sample names it, under the policy


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
    reader = SampleReader(index, fields)
    samples: list[DecodedSample] = []
    for shard, position in _places(index, limit):
        sample = reader.read(shard, position)
        if isinstance(sample, BadSample):
            raise BadSampleError(sample, f"see `halfstep shards verify {index.root}`, or pack again")
        samples.append(sample)
    return _batch(samples, index.image_size, fields, ())


def _places(index: ShardIndex, limit: int | None) -> list[tuple[int, int]]:
    return [(shard, position) for shard, count in enumerate(index.samples_per_shard) for position in range(count)][:limit]


def _batch(samples: Sequence[DecodedSample], image_size: int, fields: Sequence[Field], replaced: tuple[BadSample, ...]) -> MicroBatch:
    return MicroBatch(
        images=images_tensor([sample.pixels for sample in samples], image_size=image_size),
        keys=tuple([sample.key for sample in samples]),
        captions=tuple([sample.caption for sample in samples]) if "caption" in fields else (),
        attributes=tuple([sample.attributes for sample in samples]) if "attributes" in fields else (),
        replaced=replaced,
    )


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
