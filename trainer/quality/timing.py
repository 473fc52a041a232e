"""How fast a model draws, by batch size: whole draws, all processes at the same time."""

import time
from collections.abc import Sequence
from statistics import median

import torch

from data_shards import ranks
from trainer.evaluation import BatchTiming
from trainer.pictures import Entry, predictor
from trainer.sample import draw_share

_MOST_DRAWS = 5
_ENOUGH_SECONDS = 10.0
"""A draw is repeated up to five times, but not once more than these seconds allow."""


def time_batches(entry: Entry, sizes: Sequence[int], *, seed: int) -> tuple[BatchTiming, ...]:
    """Seconds an image and images a second of every batch size, after a draw of one step that is not measured. Collective."""
    predict, device = predictor(entry), ranks.device()
    timings = []
    for size in sizes:

        def draw(steps: int, size: int = size) -> float:
            started = time.perf_counter()
            draw_share(
                predict,
                entry.source,
                steps=steps,
                seed=seed,
                indices=range(size),
                sampler=entry.sampler,
                batch_size=size,
                device=device,
            )
            return time.perf_counter() - started

        draw(1)
        ranks.barrier()  # all begin together, as they would draw
        taken = [draw(entry.steps)]
        while len(taken) < _MOST_DRAWS and sum(taken) + taken[-1] < _ENOUGH_SECONDS:
            taken.append(draw(entry.steps))
        seconds = ranks.all_gather_tensor(torch.tensor(median(taken) / size, dtype=torch.float64))
        timings.append(BatchTiming(size, float(seconds.mean()), float((1 / seconds).sum())))
    return tuple(timings)
