"""What two ranks do to show that true shapes train here: real steps, memory and live bytes counted."""

import resource
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from data_shards import ranks
from trainer.config_io import load_recipe
from trainer.engines.engine import LossPerImage
from trainer.models.network import Network
from trainer.plan.from_latent import build, latent_shape
from trainer.plan.from_recipe import plan_input
from trainer.plan.live_bytes import LiveBytes
from trainer.stop import StopRequest
from trainer.tasks.task import Task
from trainer.train import build_engine, train
from trainer.watch import Watch

_GIB = 2**30


def two_steps(recipe: str, overrides: list[str], ranks: int) -> dict[str, object]:
    """Two optimizer steps of a recipe's network with random weights of its true shape, under its engine. Collective.

    Returns losses, the largest live bytes of the second step, and the resident memory in GiB that this rank took beyond its imports."""
    config = load_recipe(Path(recipe), overrides)
    plan = plan_input(config, world_size=ranks, ranks_per_node=ranks, on_gpu=False)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with torch.random.fork_rng(), LiveBytes() as live:
        torch.manual_seed(0)
        trained = build(config)
        _draw_weights(trained.module)
        if config.train.activation_checkpointing:
            trained.denoiser.checkpoint_activations()
        task = Task(
            module=trained.module,
            units=trained.denoiser.units(),
            micro_batch=lambda batches, step, index: (_ for _ in ()).throw(AssertionError("not asked for")),
            draw=None,
            descriptor=_Nothing(),
            attention="sdpa",
            flops_per_image=0,
        )
        engine = build_engine(config, task)
        x_t = torch.randn(plan.micro_batch_size, *latent_shape(config, config.data.image_size or 0))
        cond = {name: torch.randn(plan.micro_batch_size, *shape) for name, shape in (plan.shapes.cond or {}).items()}
        losses, peak = [], 0
        for step in range(2):
            live.restart_peak()
            votes = (0.0, 0.0)
            result = engine.step(step, _losses(x_t, cond, count=plan.accumulation), learning_rate=1e-4, votes=votes, loss_limit=None)
            assert result.outcome == "applied", result
            losses.append(result.loss)
            peak = live.tally.peak
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"losses": losses, "peak_bytes": peak, "taken_gib": taken * 1024 / _GIB}


@torch.no_grad()
def _draw_weights(module: nn.Module) -> None:
    """Small random weights of the shapes that are there, norms that leave things as they are."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.zero_() if ".lora_B." in name else parameter.normal_(std=0.02)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _losses(x_t: Tensor, cond: dict[str, Tensor], *, count: int) -> Iterator[LossPerImage]:
    def loss(network: Network) -> Tensor:
        return (network(x_t, torch.full((len(x_t),), 500.0), cond).float() - x_t).square().flatten(1).mean(1)

    for _ in range(count):
        yield loss


class _Nothing:
    def to_json(self) -> dict[str, object]:
        """No meaning: nothing is saved."""
        return {}


def train_run(run_dir: str) -> dict[str, object]:
    """Train a run to its end or to where it is to stop. Collective.

    Returns the worker's exit code, the seconds, and the resident memory in GiB that this rank took beyond its imports."""
    path, started = Path(run_dir), time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    watch = Watch(path, rank=ranks.rank(), world_size=ranks.world_size(), limit_seconds=1000)
    try:
        code = train(path, StopRequest(), watch)
    finally:
        watch.close()
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"code": code, "seconds": time.perf_counter() - started, "taken_gib": taken * 1024 / _GIB}
