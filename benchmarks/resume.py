"""Seconds from nothing to the first micro-batch at step 0 and at step 1,000,000; one JSON object a line."""

import argparse
import statistics
import tempfile
import time

import torch
from measure import print_ratio

from data_shards.index import ShardIndex
from data_shards.packing.pack import pack
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader
from data_shards.sources.faces import FacesSource

LATE_STEP = 1_000_000
GLOBAL_BATCH_SIZE = 32
MICRO_BATCH_SIZE = 16


def main() -> None:
    """Packs faces, then starts at both steps by turns, each time with a plan and a reader that know nothing yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats, under a minute")
    parser.add_argument("--repeats", type=int, help="repeats to take (51 with --quick, else 301)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, repeats = (2000, 51) if options.quick else (10_000, 301)
    with tempfile.TemporaryDirectory() as folder:
        index = pack(FacesSource("open-peeps", images), folder, size=64)
        compare(index, repeats=options.repeats or repeats)


def compare(index: ShardIndex, *, repeats: int) -> None:
    """Print how the two starts compare: a ratio of 1 says that a late start costs the same."""
    taken = [one_repeat(index, late_first=repeat % 2 == 1) for repeat in range(repeats + 3)][3:]  # the first ones warm caches
    early, late = ([times[step] for times in taken] for step in (0, LATE_STEP))
    print_ratio(
        "resume_first_batch",
        [before / after for before, after in zip(early, late, strict=True)],
        against="the same at step 0",
        microseconds_step_0=1e6 * statistics.median(early),
        microseconds_step_1000000=1e6 * statistics.median(late),
    )


def one_repeat(index: ShardIndex, *, late_first: bool) -> dict[int, float]:
    """Seconds of a start at each step."""
    steps = (LATE_STEP, 0) if late_first else (0, LATE_STEP)
    return {step: seconds_to_first_batch(index, step) for step in steps}


def seconds_to_first_batch(index: ShardIndex, step: int) -> float:
    """Of a new plan and a new reader; the page cache holds the shards."""
    start = time.perf_counter()
    plan = Plan(index.samples_per_shard, seed=0, global_batch_size=GLOBAL_BATCH_SIZE, micro_batch_size=MICRO_BATCH_SIZE)
    read = loader(MicroBatches(index, plan), start_step=step, stop_step=step + 1, indices=range(plan.micro_batches))
    next(read)
    seconds = time.perf_counter() - start
    read.close()
    return seconds


if __name__ == "__main__":
    main()
