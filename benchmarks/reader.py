"""Images a second of our reader against stock webdataset and against decoding alone; one JSON object a line."""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
import webdataset
from measure import print_ratio
from webdataset.compat import WebDataset

from data_shards.decode import images_tensor
from data_shards.faces import FacesSource
from data_shards.images import image_pixels
from data_shards.index import ShardIndex
from data_shards.pack import pack
from data_shards.plan import Plan
from data_shards.read import MicroBatches, loader

MICRO_BATCH_SIZE = 16
GLOBAL_BATCH_SIZE = 32
TURNS = 4
BATCHES_A_TURN = 32


def main() -> None:
    """Packs faces, then reads them in three ways by turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats, under a minute")
    parser.add_argument("--repeats", type=int, help="repeats to take (21 with --quick, else 61)")
    parser.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, repeats = (1024, 21) if options.quick else (6016, 61)
    with tempfile.TemporaryDirectory() as folder:
        index = pack(FacesSource("open-peeps", images), folder, size=options.size)
        compare(index, repeats=options.repeats or repeats)


def compare(index: ShardIndex, *, repeats: int) -> None:
    """Print a line for each of the two things we are measured against."""
    readers = {"ours": our_batches(index), "webdataset": webdataset_batches(index), "decoding": decoded_batches(index)}
    taken = [one_repeat(readers, first=repeat) for repeat in range(repeats + 1)][1:]  # the first one warms caches
    baselines = {"webdataset": f"webdataset {webdataset.__version__}", "decoding": "the same decoder on bytes in memory"}
    for name, against in baselines.items():
        ratios = [seconds[name] / seconds["ours"] for seconds in taken]
        ours, theirs = (1 / statistics.median(seconds[reader] for seconds in taken) for reader in ("ours", name))
        speeds = {"images_per_second": ours, "images_per_second_against": theirs}
        print_ratio(f"reader_against_{name}", ratios, against=against, **speeds)


def one_repeat(readers: Mapping[str, Iterator[torch.Tensor]], *, first: int) -> dict[str, float]:
    """Seconds an image of each reader, which take turns of about 20 ms, so that a busy machine slows all of them alike."""
    names = list(readers)
    seconds = dict.fromkeys(names, 0.0)
    for turn in range(TURNS):
        for place in range(len(names)):
            name = names[(first + turn + place) % len(names)]
            reader, start = readers[name], time.perf_counter()
            for _ in range(BATCHES_A_TURN):
                next(reader)
            seconds[name] += time.perf_counter() - start
    return {name: value / (TURNS * BATCHES_A_TURN * MICRO_BATCH_SIZE) for name, value in seconds.items()}


def our_batches(index: ShardIndex) -> Iterator[torch.Tensor]:
    """The plan's batches on one rank, in this process, epoch after epoch, as training reads them."""
    plan = Plan(index.samples_per_shard, seed=0, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE)
    for batch in loader(MicroBatches(index, plan), start_step=0, stop_step=sys.maxsize, indices=range(plan.micro_batches)):
        yield batch.images


def webdataset_batches(index: ShardIndex) -> Iterator[torch.Tensor]:
    """Stock webdataset, unshuffled and so at its fastest, with our decoder."""

    def pixels(sample: tuple[bytes]) -> bytes:
        return image_pixels(sample[0], "png", size=(index.side(), index.side()))

    def tensor(rows: list[bytes]) -> torch.Tensor:
        return images_tensor(rows, image_size=index.side())

    urls = [str(index.root / shard.name) for shard in index.shards]
    dataset = WebDataset(urls, shardshuffle=False).to_tuple("png").map(pixels)
    batched = cast("Iterable[torch.Tensor]", dataset.batched(MICRO_BATCH_SIZE, collation_fn=tensor, partial=False))
    while True:
        yield from batched


def decoded_batches(index: ShardIndex) -> Iterator[torch.Tensor]:
    """Every image's bytes, already in memory, to batches of pixels."""
    contents = encoded_images(index)
    while True:
        for first in range(0, len(contents) - MICRO_BATCH_SIZE + 1, MICRO_BATCH_SIZE):
            rows = [
                image_pixels(content, "png", size=(index.side(), index.side())) for content in contents[first : first + MICRO_BATCH_SIZE]
            ]
            yield images_tensor(rows, image_size=index.side())


def encoded_images(index: ShardIndex) -> list[bytes]:
    """The PNG bytes of every sample, in the order of the index."""
    contents: list[bytes] = []
    for shard in index.shards:
        tar, members = (index.root / shard.name).read_bytes(), shard.members["png"]
        contents += [tar[offset : offset + size] for offset, size in zip(members.offsets, members.sizes, strict=True)]
    return contents


if __name__ == "__main__":
    main()
