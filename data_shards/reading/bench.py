"""What bounds reading on this machine: disk or network, decoding, scaling, the way to the device; and how many workers pay.

`python -m data_shards.reading.bench SHARDS OPTIONS` writes a JSON object a line: done and total while it measures, then found or error."""

import itertools
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import final

import torch

from data_shards.config import IMAGE_FORMATS
from data_shards.images import DecodeError, image_pixels, scaled_pixels
from data_shards.index import Shard, ShardIndex
from data_shards.reading.decode import fitted_images, images_tensor
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader
from data_shards.reading.sample import BadSampleError
from data_shards.reading.sample_reader import SampleReader
from data_shards.remote.cache import ShardCache
from data_shards.remote.locations import Location
from data_shards.remote.store import Store, store_of

FEW_SHARDS = 2
DISK_BYTES = 2**29  # of each shard at most, and for no longer than DISK_SECONDS
DISK_SECONDS = 1.0
FETCH_SECONDS = 4.0  # after which no second shard is fetched
DECODE_SECONDS = 1.5
DEVICE_SECONDS = 0.3
READER_SECONDS = 2.0  # at each number of workers
DECODED_IMAGES = 256
DECODED_BYTES = 2**26
AS_GOOD = 0.95  # of the best reader's speed: fewer workers that reach it are taken
_BLOCK_BYTES = 2**23
_MEGA = 1e6

Progress = Callable[[int, int], None]


@final
@dataclass(frozen=True)
class Measured:
    """Images a second of every part of reading, each by itself; None for what this machine or these shards do not have.

    sample_bytes: what a sample takes of its tar. disk: one process reading tars that the page cache does not hold; network: one
    connection; decode and resize: of one core;
    device: copies from pinned and from ordinary memory; readers: the whole reader, by number of workers.
    """

    cores: int
    sample_bytes: float
    disk: float | None
    network: float | None
    decode: float
    resize: float | None
    device_pinned: float | None
    device_unpinned: float | None
    readers: Mapping[int, float]


@final
@dataclass(frozen=True)
class Verdict:
    """What to set. bottleneck: disk, network, transfer or decoding; images_per_second: what that leaves."""

    bottleneck: str
    workers: int
    images_per_second: float


def verdict(found: Measured) -> Verdict:
    """The fewest workers that are nearly as quick as any, and what they wait for.

    With a device no worker at all is no choice: it would wait while an image is decoded.
    """
    readers = {workers: speed for workers, speed in found.readers.items() if workers or found.device_pinned is None} or found.readers
    best = max(readers.values())
    workers = min(workers for workers, speed in readers.items() if speed >= AS_GOOD * best)
    ceilings = {"disk": found.disk, "network": found.network, "transfer": found.device_pinned}
    limits = {name: speed for name, speed in ceilings.items() if speed is not None and speed < readers[workers]}
    if not limits:
        return Verdict("decoding", workers, readers[workers])
    bottleneck = min(limits, key=lambda name: limits[name])
    enough = [count for count, speed in readers.items() if speed >= limits[bottleneck]]
    return Verdict(bottleneck, min(enough, default=workers), limits[bottleneck])


def measure(
    index: ShardIndex,
    *,
    image_size: int | None,
    batch_size: int,
    workers: Sequence[int],
    progress: Progress = lambda done, total: None,
    scale: float = 1.0,
) -> Measured:
    """Takes about 4 seconds and 2 more for each number of workers; the page cache gives up what of the shards is read from disk.

    Remote shards: one or two are fetched to a temporary folder and read there. scale: of the seconds that each part is given.
    Raises: ValueError if these images or sizes can't be read; BadSampleError; FetchError.
    """
    if index.samples < batch_size:
        raise ValueError(f"--batch-size {batch_size}: {index.root} holds {index.samples} samples; give fewer")
    if image_size is None and index.image_size is None:
        raise ValueError(f"{index.root}: its images are of several sizes; give --image-size, as data.image_size in a recipe")
    total = 4 + len(workers)
    steps = itertools.count(1)
    with ExitStack() as stack:
        progress(0, total)
        few, store, network = _near(index, batch_size, stack)
        disk = _disk(few, store, DISK_SECONDS * scale) if network is None else None
        progress(next(steps), total)
        size = None if image_size is None else (image_size, image_size)
        plan = Plan(few.samples_per_shard, seed=0, global_batch_size=batch_size, micro_batch_size=batch_size)
        batches = MicroBatches(few, plan, sizes=None if size is None else [size], stores=[store])
        images = batches[0, 0].images  # names a sample that can't be read
        progress(next(steps), total)
        decode, resize = _decoding(SampleReader(few, stores=[store]), size, batch_size, DECODE_SECONDS * scale)
        progress(next(steps), total)
        pinned, unpinned = _device(images)
        progress(next(steps), total)
        readers: dict[int, float] = {}
        for count in workers:
            readers[count] = _reading(batches, count, READER_SECONDS * scale)
            progress(next(steps), total)
    sample_bytes = sum(shard.size_bytes for shard in index.shards) / index.samples
    return Measured(
        cores=len(os.sched_getaffinity(0)),
        sample_bytes=sample_bytes,
        disk=None if disk is None else disk / sample_bytes,
        network=None if network is None else network / sample_bytes,
        decode=decode,
        resize=resize,
        device_pinned=pinned,
        device_unpinned=unpinned,
        readers=readers,
    )


def _near(index: ShardIndex, batch_size: int, stack: ExitStack) -> tuple[ShardIndex, Store, float | None]:
    """The shards to read, their store, and the bytes a second that they came with if they had to be fetched."""
    location = Location.parse(index.location) if index.location is not None else None
    if location is None or not location.is_remote:
        return index, store_of(index), None
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="halfstep-bench-")))
    cache = stack.enter_context(ShardCache(folder, 2**62, limit_setting="room in TMPDIR"))
    start, fetched = time.perf_counter(), list[Shard]()
    for shard in index.shards:
        cache.open(location.join(shard.name), size_bytes=shard.size_bytes, sha256=shard.sha256).close()
        fetched.append(shard)
        enough = sum(shard.samples for shard in fetched) >= batch_size
        if enough and (len(fetched) >= FEW_SHARDS or time.perf_counter() - start > FETCH_SECONDS):
            break
    speed = sum(shard.size_bytes for shard in fetched) / (time.perf_counter() - start)
    few = replace(index, shards=tuple(fetched))
    return few, store_of(few, cache), speed


def _disk(index: ShardIndex, store: Store, limit_seconds: float) -> float | None:
    """Bytes a second of tars that were put out of the page cache."""
    done, seconds = 0, 0.0
    for shard in index.shards[-FEW_SHARDS:]:
        with store.open(shard) as file:
            os.fsync(file.fileno())  # what is still to be written can't be put out
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start, offset = time.perf_counter(), 0
            while offset < DISK_BYTES and time.perf_counter() - start < limit_seconds:
                block = os.pread(file.fileno(), _BLOCK_BYTES, offset)
                if not block:
                    break
                offset += len(block)
            seconds += time.perf_counter() - start
            done += offset
    return done / seconds if done else None


def _decoding(reader: SampleReader, size: tuple[int, int] | None, batch_size: int, limit_seconds: float) -> tuple[float, float | None]:
    """Images a second that this thread decodes, and that it scales, from bytes in memory."""
    stored = list(_encoded(reader))
    plain = size is None or all(found == size for _, _, found in stored)
    decoded = fitting = 0.0
    images = 0
    start = time.perf_counter()
    for first in itertools.cycle(range(0, len(stored), batch_size)):
        part = stored[first : first + batch_size]
        began = time.perf_counter()
        if plain or size is None:
            rows = [image_pixels(content, extension, size=found) for content, extension, found in part]
            images_tensor(rows, len(rows), size=part[0][2])
            decoded += time.perf_counter() - began
        else:
            scaled = [scaled_pixels(content, extension, size=found, least=size) for content, extension, found in part]
            decoded += (middle := time.perf_counter()) - began
            fitted_images(scaled, size=size)
            fitting += time.perf_counter() - middle
        images += len(part)
        if time.perf_counter() - start > limit_seconds:
            break
    return images / decoded, None if plain else images / fitting


def _encoded(reader: SampleReader) -> Iterator[tuple[bytes, str, tuple[int, int]]]:
    """Some images' bytes, their extension and size in pixels. Raises: BadSampleError."""
    taken = 0
    places = ((shard, position) for shard, entry in enumerate(reader.shards) for position in range(entry.samples))
    for shard, position in itertools.islice(places, DECODED_IMAGES):
        members = reader.shards[shard].members
        extension = next((name for name in IMAGE_FORMATS if name in members and members[name].sizes[position] >= 0), "png")
        try:
            content = reader.content(shard, position, extension)
            if content is None:
                raise DecodeError("it has no image")
        except (DecodeError, OSError) as error:
            raise BadSampleError(
                reader.bad(shard, position, str(error)), f"see `halfstep shards verify {reader.indexes[0].root}`"
            ) from None
        yield content, extension, reader.indexes[0].size_at(reader.shards[shard], position)
        taken += len(content)
        if taken > DECODED_BYTES:
            return


def _device(images: torch.Tensor) -> tuple[float | None, float | None]:
    """Images a second from pinned and from ordinary memory to the device; None without one."""
    if not torch.cuda.is_available():
        return None, None

    def speed(source: torch.Tensor) -> float:
        source.to("cuda", non_blocking=True)
        torch.cuda.synchronize()
        start, done = time.perf_counter(), 0
        while time.perf_counter() - start < DEVICE_SECONDS:
            source.to("cuda", non_blocking=True)
            torch.cuda.synchronize()
            done += len(source)
        return done / (time.perf_counter() - start)

    return speed(images.pin_memory()), speed(images)


def _reading(batches: MicroBatches, workers: int, limit_seconds: float) -> float:
    """Images a second of the whole reader, once its workers have begun."""
    last = sys.maxsize // batches.plan.micro_batches
    read = loader(batches, start_step=0, stop_step=last, indices=range(1), workers=workers)
    for _ in range(max(1, workers)):
        next(read)
    start, images = time.perf_counter(), 0
    while time.perf_counter() - start < limit_seconds or images == 0:
        images += len(next(read).images)
    seconds = time.perf_counter() - start
    read.close()
    return images / seconds


def main() -> None:
    """For a command line that may not import torch."""
    root, options = Path(sys.argv[1]), json.loads(sys.argv[2])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*worker processes in total")  # more workers than cores are tried on purpose
    try:
        found = measure(
            ShardIndex.load(root),
            image_size=options["image_size"],
            batch_size=options["batch_size"],
            workers=options["workers"],
            scale=options["scale"],
            progress=lambda done, total: _say({"done": done, "total": total}),
        )
    except (ValueError, RuntimeError, OSError) as error:
        _say({"error": str(error), "is_input": isinstance(error, ValueError)})
        sys.exit(1)
    _say({"found": {**asdict(found), "verdict": asdict(verdict(found))}})


def _say(entry: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(entry) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
