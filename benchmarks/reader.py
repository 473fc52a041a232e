"""Images a second of our reader against other readers and against decoding alone; one JSON object a line for each case."""

import argparse
import gc
import multiprocessing
import os
import re
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import final

# Data sets of Hugging Face are on this disk; nothing is to be asked for or left behind elsewhere.
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1")

import datasets
import torch
from measure import print_ratio
from reader_images import Case, Stored, stored_images
from reader_peers import PEERS, decoding_batches
from torch import Tensor

from data_shards.config import ImageFormat
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader

TURN_SECONDS = {1: 0.1, 2: 0.3}
"""By processes. Where two workers take turns with others', a turn must be long against a batch that is half done when it ends."""
FORMATS: tuple[ImageFormat, ...] = ("jpg", "png", "webp")
OURS, DECODING = "ours", "decoding"


CASES = (*(Case(extension, side) for side in (64, 512) for extension in FORMATS), Case("jpg", 512, 64))


def main() -> None:
    """Makes the images of each case, stores them for each reader and lets all of them read by turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images and repeats, under two minutes")
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="only this one; may be repeated")
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only with so many")
    parser.add_argument("--repeats", type=int, help="repeats to take (3 with --quick, else 25)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    repeats = options.repeats or (3 if options.quick else 25)
    cases = [case for case in CASES if options.case is None or case.name in options.case]
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_HOME"] = folder
        stored: dict[tuple[str, int], Stored] = {}
        for case in cases:
            key = case.extension, case.stored_side
            if key not in stored:
                distinct = (4 if options.quick else 24) if case.stored_side > 64 else (32 if options.quick else 256)
                samples = 256 if case.stored_side > 64 else 2048
                root = Path(folder) / case.name
                stored[key] = stored_images(root, case.extension, case.stored_side, distinct=distinct, samples=samples)
            for processes in (1, 2) if options.processes is None else (options.processes,):
                compare(case, stored[key], processes, repeats=repeats, turn_seconds=TURN_SECONDS[processes] / (2 if options.quick else 1))


def compare(case: Case, stored: Stored, processes: int, *, repeats: int, turn_seconds: float) -> None:
    """Print the case's line: ours against the best of the others, and everyone's images a second."""
    build = {OURS: our_batches, **PEERS, DECODING: decoding_batches}
    with readers_of(build, case, stored, 0 if processes == 1 else processes) as readers:
        batches = batches_a_turn(readers[DECODING], processes, turn_seconds)
        taken = [one_repeat(readers, batches, first=repeat) for repeat in range(repeats + 1)][1:]  # the first one warms caches
    speeds = {name: case.batch_size * batches / statistics.median(turn[name] for turn in taken) for name in build}
    best = max(PEERS, key=lambda name: speeds[name])
    of_decoding = statistics.median(turn[DECODING] / turn[OURS] for turn in taken)
    print_ratio(
        f"reader_{case.name.replace('-', '_')}_{processes}_process{'es' if processes > 1 else ''}",
        [turn[best] / turn[OURS] for turn in taken],
        against=best,
        percent_of_decoding=100 * of_decoding,
        **{f"{key_of(name)}_images_per_second": speed for name, speed in speeds.items()},
    )


def key_of(name: str) -> str:
    """A reader's name without its version, as a key."""
    return re.sub(r"[^a-z]+", "_", re.sub(r"[0-9.]+", "", name)).strip("_")


def batches_a_turn(decoding: "Reader", processes: int, turn_seconds: float) -> int:
    """How many batches everybody reads in a turn; as many for each worker."""
    decoding.seconds(2 * processes)
    seconds = decoding.seconds(4 * processes) / (4 * processes)
    return max(2, round(turn_seconds / seconds / processes)) * processes


def one_repeat(readers: Mapping[str, "Reader"], batches: int, *, first: int) -> dict[str, float]:
    """Seconds of a turn of each reader; the one who begins changes, and a busy machine slows all of them alike."""
    names = list(readers)
    turns = [names[(first + place) % len(names)] for place in range(len(names))]
    return {name: readers[name].seconds(batches) for name in turns}


@final
class Reader:
    """Endless batches whose worker processes stand still when it isn't their turn."""

    def __init__(self, start: Callable[[], Iterator[Tensor]], shape: tuple[int, ...] | None) -> None:
        before = set(multiprocessing.active_children())
        self._batches = start()
        found = next(self._batches)
        if shape is not None and (tuple(found.shape) != shape or found.dtype != torch.uint8):
            raise RuntimeError(f"a reader gives {tuple(found.shape)} of {found.dtype}, wanted {shape} of uint8")
        self._workers: list[BaseProcess] = [child for child in multiprocessing.active_children() if child not in before]
        self.send(signal.SIGSTOP)

    def seconds(self, batches: int) -> float:
        """How long reading so many takes."""
        self.send(signal.SIGCONT)
        start = time.perf_counter()
        for _ in range(batches):
            next(self._batches)
        seconds = time.perf_counter() - start
        self.send(signal.SIGSTOP)
        return seconds

    def send(self, number: signal.Signals) -> None:
        """To its own workers."""
        for worker in self._workers:
            if worker.pid is not None:
                os.kill(worker.pid, number)

    def close(self) -> None:
        """Ends the workers."""
        self.send(signal.SIGCONT)
        del self._batches
        gc.collect()
        for worker in self._workers:
            worker.join()


Build = Callable[[Stored, Case, int], Iterator[Tensor]]


@contextmanager
def readers_of(build: Mapping[str, Build], case: Case, stored: Stored, workers: int) -> Iterator[dict[str, Reader]]:
    """All readers of a case, each having given a batch."""
    readers: dict[str, Reader] = {}
    try:
        for name, make in build.items():
            shape = None if name == DECODING else (case.batch_size, 3, case.read_side, case.read_side)
            readers[name] = Reader(partial(make, stored, case, workers), shape)
        yield readers
    finally:
        for reader in readers.values():
            reader.close()


def our_batches(stored: Stored, case: Case, workers: int) -> Iterator[Tensor]:
    """The plan's shuffled batches of one rank, epoch after epoch, as training reads them; every byte is compared with its crc32."""
    index = stored.index
    plan = Plan(index.samples_per_shard, seed=0, global_batch_size=2 * case.batch_size, micro_batch_size=case.batch_size)
    batches = MicroBatches(index, plan, sizes=None if case.side is None else [(case.side, case.side)])
    read = loader(batches, start_step=0, stop_step=sys.maxsize // plan.micro_batches, indices=range(plan.micro_batches), workers=workers)
    return (batch.images for batch in read)


if __name__ == "__main__":
    main()
