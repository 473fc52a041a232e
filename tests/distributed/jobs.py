"""What the pools' ranks do: the functions that they run, all ranks together."""

import threading
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from data_shards import ranks
from data_shards.index import ShardIndex
from trainer.auto_choice import Choice
from trainer.auto_measure import settle
from trainer.checkpoint import agree_on_pieces, agreed_checkpoint, read_tensors
from trainer.config_io import load_recipe
from trainer.stop import StopRequest
from trainer.tasks.build import build_task
from trainer.train import build_engine, restore, train
from trainer.training_data import TrainingData
from trainer.watch import Watch

HANG_SECONDS = 100.0
"""After which a rank in a hang ends itself, with its stacks in RUN_DIR/logs; within the pool's limit of a job."""


def train_run(run_dir: str) -> int:
    """Train the run to its end; returns the worker's exit code. Collective."""
    path = Path(run_dir)
    watch = Watch(path, rank=ranks.rank(), world_size=ranks.world_size(), limit_seconds=HANG_SECONDS)
    try:
        return train(path, StopRequest(), watch)
    finally:
        watch.close()


def load_run(run_dir: str) -> dict[str, object]:
    """Load a run's newest checkpoint into its recipe's engine. Collective.

    Returns `different`: tensors of which this rank holds an element that is not, bit for bit, the saved one; and `elements`: how
    many this rank holds, by part."""
    path = Path(run_dir)
    config, checkpoint = load_recipe(path / "recipe.yaml", []), agreed_checkpoint(path)
    assert checkpoint is not None, f"{path}: no checkpoint"
    task = build_task(config, path, ShardIndex.load(path / str(config.data.shards)).side())
    engine = build_engine(config, task)
    restore(engine, checkpoint, task, agree_on_pieces(engine.state()))
    different, elements = [], {}
    for part, shards in engine.state().items():
        saved = read_tensors(checkpoint, part)
        for name, shard in shards.items():
            count = shard.values.numel()
            expected = saved[name].reshape(-1)[shard.start : shard.start + count]
            if not torch.equal(_bits(shard.values), _bits(expected)):
                different.append(f"{part}/{name}")
            elements[part] = elements.get(part, 0) + count
    return {"different": different, "elements": elements}


def _bits(values: Tensor) -> Tensor:
    """Row-major, so that -0.0 and NaN count as what they are."""
    return values.detach().contiguous().view(-1).view(torch.int32)


def sum_over_ranks(value: float) -> tuple[int, float]:
    """This rank and the sum of the ranks' values. Collective."""
    total = torch.tensor(value)
    ranks.all_reduce_sum(total)
    return ranks.rank(), total.item()


def raise_on_rank_1(value: int) -> None:
    """Fail on rank 1 while the others wait for it. Collective."""
    if ranks.rank() == 1:
        raise ValueError(f"rank 1 does not like {value}")
    ranks.barrier()


def wait_on_rank_0() -> None:
    """Hang on rank 0 alone."""
    if ranks.rank() == 0:
        threading.Event().wait()


def settle_run(run_dir: str, recipes: list[str]) -> dict[str, object]:
    """Measure what the run's recipe leaves open, and choose the last candidate; the train section that this rank goes on with. Collective.

    recipes: of each rank."""
    path = Path(run_dir)
    config = load_recipe(Path(recipes[ranks.rank()]), [])
    watch = Watch(path, rank=ranks.rank(), world_size=ranks.world_size(), limit_seconds=HANG_SECONDS)
    try:
        with mock.patch("trainer.auto_measure.choose", lambda timings, micro_batches: Choice(timings[-1].candidate, ("for a test",))):
            settled = settle(config, path, TrainingData.open(config, path), start_step=0, stop=StopRequest(), watch=watch)
    finally:
        watch.close()
    assert settled is not None, "nobody asked to stop"
    return settled.train.model_dump(mode="json")
