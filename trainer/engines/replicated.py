"""The whole model on every rank: gradients, weights and averages in flat buffers, one reduction a step in a fixed order."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import final

import torch
from torch import nn

from data_shards import ranks
from trainer.config import EmaConfig, OptimConfig
from trainer.engines.engine import LossPerImage, State, StepResult
from trainer.engines.local_state import LocalState, Place
from trainer.engines.precision import autocast, evaluation
from trainer.models.network import Network, network
from trainer.optim import build_optimizer
from trainer.spans import span

_ALIGNMENT = 16  # floats: 64 bytes, a cache line and what vector kernels like


@final
class Replicated:
    """Data parallelism by summing one flat gradient buffer over the ranks.

    The buffer holds the gradients in parameter order from the first step on, then one loss a micro-batch and the votes; so a
    step has one reduction, whose order depends on sizes alone (DDP's buckets change after its first step)."""

    def __init__(
        self,
        module: nn.Module,
        *,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
        memory_format: str,
        micro_batches: int,
        votes: int = 1,
        compile: bool = False,
    ) -> None:
        """micro_batches: how many make the global batch; this rank's share is the ranks.share of it. Frozen parameters stay as they are.

        votes: how many numbers `step` adds up beside the losses."""
        self.module = module.to(ranks.device()).train()
        self.micro_batches, self.precision = micro_batches, precision
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        places, size = _flat_places(trained, channels_last=memory_format == "channels_last")
        weights = torch.zeros(size, device=ranks.device())
        self.reduced = torch.zeros(size + micro_batches + votes, device=ranks.device())
        self.gradients, self.tail = self.reduced[:size], self.reduced[size:]
        with torch.no_grad():
            for name, parameter in trained.items():
                view = places[name].view([weights])
                view.copy_(parameter)
                parameter.data = view
                parameter.grad = places[name].view([self.gradients])
        self.flat = nn.Parameter(weights)
        self.flat.grad = self.gradients
        self.local = LocalState(
            [self.flat], places, optimizer=build_optimizer(optim, [self.flat]), optim=optim, ema=ema, precision=precision
        )
        if compile:
            module.compile()
        self.network = network(module)

    def step(
        self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, votes: Sequence[float], loss_limit: float | None = None
    ) -> StepResult:
        """See Engine.step."""
        self.reduced.zero_()
        share = self.local.scale.value / self.micro_batches
        for index, loss_per_image in zip(ranks.share(self.micro_batches), losses, strict=True):
            with span("forward"), autocast(self.precision):
                loss = loss_per_image(self.network).mean()
            with span("backward"):
                (loss * share).backward()
            self.tail[index] = loss.detach()
        self.tail[self.micro_batches :] = torch.tensor(votes)
        with span("reduction"):
            ranks.all_reduce_sum(self.reduced)
            norm = torch.linalg.vector_norm(self.gradients)
            numbers = self.tail.tolist()
            gradient_norm = norm.item() / self.local.scale.value
        loss_list, told = numbers[: self.micro_batches], numbers[self.micro_batches :]
        outcome = self.local.update(
            step, [self.gradients], losses=loss_list, gradient_norm=gradient_norm, learning_rate=learning_rate, loss_limit=loss_limit
        )
        return StepResult(outcome, tuple(loss_list), gradient_norm, tuple(told))

    def state(self) -> State:
        """See Engine.state."""
        return self.local.shards()

    def restored(self, loss_scale: Mapping[str, float]) -> None:
        """See Engine.restored."""
        self.local.scale.restore(loss_scale)

    def loss_scale(self) -> Mapping[str, float]:
        """See Engine.loss_scale."""
        return self.local.scale.to_json()

    def raw(self) -> Network:
        """See Engine.raw."""
        return evaluation(self.module, network(self.module), self.precision)

    @contextmanager
    def averaged(self) -> Iterator[Network]:
        """See Engine.averaged."""
        with self.local.averaged():
            yield self.raw()


def _flat_places(trained: Mapping[str, nn.Parameter], *, channels_last: bool) -> tuple[dict[str, Place], int]:
    """Places one after the other in one buffer, in module order, each start on a cache line; and the buffer's size."""
    places, size = {}, 0
    for name, parameter in trained.items():
        count = parameter.numel()
        places[name] = Place(tuple(parameter.shape), 0, buffer=0, offset=size, count=count, channels_last=channels_last)
        size += -(-count // _ALIGNMENT) * _ALIGNMENT
    return places, size
