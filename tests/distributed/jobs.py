"""What the pools' ranks do: the functions that they run, all ranks together."""

import threading
from pathlib import Path

import torch

from trainer import dist
from trainer.stop import StopRequest
from trainer.train import train


def train_run(run_dir: str) -> int:
    """Train the run to its end; returns the worker's exit code. Collective."""
    return train(Path(run_dir), StopRequest())


def sum_over_ranks(value: float) -> tuple[int, float]:
    """This rank and the sum of the ranks' values. Collective."""
    total = torch.tensor(value)
    dist.all_reduce_sum(total)
    return dist.rank(), total.item()


def raise_on_rank_1(value: int) -> None:
    """Fail on rank 1 while the others wait for it. Collective."""
    if dist.rank() == 1:
        raise ValueError(f"rank 1 does not like {value}")
    dist.barrier()


def wait_on_rank_0() -> None:
    """Hang on rank 0 alone."""
    if dist.rank() == 0:
        threading.Event().wait()
