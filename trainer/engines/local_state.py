"""This rank's part of what is trained: fp32 weights, Adam's moments and averages, where parameters lie in them, and their update."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from trainer.config import EmaConfig, OptimConfig
from trainer.ema import ema_decay
from trainer.engines.engine import Outcome, Shard, clip_factor, judge
from trainer.engines.loss_scale import LossScale
from trainer.optim_8bit import BLOCK, AdamW8bit, Moment, Span
from trainer.spans import span

MOMENTS = ("exp_avg", "exp_avg_sq")


@final
@dataclass(frozen=True)
class Place:
    """Where this rank's part of a parameter lies: elements start ... start + count - 1 of the whole, from `offset` on in a buffer."""

    shape: tuple[int, ...]
    start: int
    buffer: int
    offset: int
    count: int
    channels_last: bool = False
    """The (whole) parameter lies in the buffer in channels-last order."""

    def view(self, buffers: Sequence[Tensor]) -> Tensor:
        """The part in one kind of buffers, in the parameter's shape if it is the whole parameter, else flat."""
        return self.shaped(buffers[self.buffer].detach()[self.offset : self.offset + self.count])

    def shaped(self, part: Tensor) -> Tensor:
        """A view of `count` elements in the buffer's order, in the parameter's shape if that is the whole parameter, else flat."""
        if self.channels_last and len(self.shape) == 4:
            out_channels, in_channels, height, width = self.shape
            return part.view(out_channels, height, width, in_channels).permute(0, 3, 1, 2)
        return part.view(self.shape) if self.start == 0 and self.count == _numel(self.shape) else part


@final
@dataclass(frozen=True, eq=False)
class PackedPart:
    """A parameter's part of a moment of 8 bits: whole blocks, in the order of the buffer that the parameter lies in."""

    moment: Moment
    first: int
    """Block."""
    place: Place

    def unpack(self) -> Tensor:
        """See Packed."""
        blocks = self.moment.read(self.first, -(-self.place.count // BLOCK))
        return self.place.shaped(blocks.view(-1)[: self.place.count])

    def pack(self, values: Tensor) -> None:
        """See Packed."""
        blocks = self.moment.scales.new_zeros(-(-self.place.count // BLOCK), BLOCK)
        self.place.shaped(blocks.view(-1)[: self.place.count]).copy_(values)
        self.moment.write(self.first, blocks)


@final
class LocalState:
    """The fp32 buffers of one rank. Adam's step count is that of the loop, so that a step left out counts too."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        places: Mapping[str, Place],
        *,
        optimizer: torch.optim.Optimizer,
        optim: OptimConfig,
        ema: EmaConfig,
        precision: str,
    ) -> None:
        """weights: flat buffers that `optimizer` updates. places: of every trained parameter of which this rank has a part."""
        self.weights, self.places, self.optimizer, self.warmup = list(weights), places, optimizer, ema.warmup
        self.max_gradient_norm = optim.max_gradient_norm
        self.scale = LossScale(enabled=precision == "fp16")
        self.decays = (ema.decay, *ema.more_decays)
        self.averages = [[buffer.detach().clone() for buffer in self.weights] for _ in self.decays]
        self.packed: dict[str, list[PackedPart]] = {}
        if isinstance(optimizer, AdamW8bit):
            spans = [Span(self.weights[place.buffer], place.offset, place.count) for place in places.values()]
            firsts = optimizer.lay_out(spans)
            for kind, moment in optimizer.moments.items():
                self.packed[kind] = [PackedPart(moment, *part) for part in zip(firsts, places.values(), strict=True)]
        for buffer in self.weights:
            if isinstance(optimizer, AdamW8bit):
                self.optimizer.state[buffer] = {"step": 0}
            else:
                moments = {moment: torch.zeros_like(buffer.detach()) for moment in MOMENTS}
                self.optimizer.state[buffer] = {"step": torch.zeros((), device=buffer.device), **moments}

    def moments(self) -> list[Tensor]:
        """The memory that holds Adam's moments."""
        if self.packed:
            return [tensor for parts in self.packed.values() for tensor in (parts[0].moment.codes, parts[0].moment.scales)]
        return [self.optimizer.state[buffer][moment] for moment in MOMENTS for buffer in self.weights]

    def shards(self) -> dict[str, dict[str, Shard]]:
        """See Engine.state."""
        named = {f"ema_{number}" if number else "ema": self._named(average) for number, average in enumerate(self.averages)}
        return {"model": self._named(self.weights), **named, "optimizer": self._moments()}

    def judge(self, losses: Sequence[float], gradient_norm: float, *, loss_limit: float | None) -> Outcome:
        """What becomes of a step; gradient_norm: without the loss scale."""
        return judge(losses, gradient_norm, loss_limit=loss_limit, scaled=self.scale.enabled)

    @torch.no_grad()
    def clip(self, gradients: Sequence[Tensor], gradient_norm: float) -> None:
        """Take the loss scale out of gradients and bring their norm to the largest allowed, in place."""
        factor = clip_factor(gradient_norm, max_gradient_norm=self.max_gradient_norm) / self.scale.value
        if factor != 1:
            torch._foreach_mul_(list(gradients), factor)

    def update(
        self,
        step: int,
        gradients: Sequence[Tensor],
        *,
        losses: Sequence[float],
        gradient_norm: float,
        learning_rate: float,
        loss_limit: float | None,
    ) -> Outcome:
        """Judge a step and, if it is good, clip, move the weights and the averages. gradients: of the weights, with the loss scale."""
        outcome = self.judge(losses, gradient_norm, loss_limit=loss_limit)
        if outcome == "applied":
            with span("clip and optimizer"):
                self.clip(gradients, gradient_norm)
                self.prepare(step, learning_rate=learning_rate)
                self.optimizer.step()
        self.finish(step, outcome)
        return outcome

    def finish(self, step: int, outcome: Outcome) -> None:
        """What follows the optimizer: the averages move, the loss scale adapts."""
        if outcome == "applied":
            with span("EMA"):
                self.average(step)
        if outcome != "bad":
            self.scale.update(overflow=outcome == "overflow")

    def prepare(self, step: int, *, learning_rate: float) -> None:
        """Set what the optimizer's next call takes from the loop: the rate, and how many steps came before."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for buffer in self.weights:
            count = self.optimizer.state[buffer]["step"]
            if isinstance(count, Tensor):
                count.fill_(step)
            else:  # DeepSpeed's CPU Adam counts with a plain number
                self.optimizer.state[buffer]["step"] = step

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Move every average towards the weights as they are after optimizer step `step`."""
        for decay, average in zip(self.decays, self.averages, strict=True):
            torch._foreach_lerp_(average, self.weights, 1 - ema_decay(step, decay=decay, warmup=self.warmup))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The first average in the weights' place; the trained weights come back."""
        trained = [buffer.detach().clone() for buffer in self.weights]
        self._overwrite(self.averages[0])
        try:
            yield
        finally:
            self._overwrite(trained)

    @torch.no_grad()
    def _overwrite(self, values: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self.weights, list(values))

    def _moments(self) -> dict[str, Shard]:
        if not self.packed:
            moments = {moment: [self.optimizer.state[buffer][moment] for buffer in self.weights] for moment in MOMENTS}
            return {f"{moment}.{name}": shard for moment, buffers in moments.items() for name, shard in self._named(buffers).items()}
        shapes = self._named([torch.empty_like(buffer, device="meta") for buffer in self.weights])
        return {
            f"{moment}.{name}": replace(shard, packed=part)
            for moment, parts in self.packed.items()
            for (name, shard), part in zip(shapes.items(), parts, strict=True)
        }

    def _named(self, buffers: Sequence[Tensor]) -> dict[str, Shard]:
        return {name: Shard(shape=place.shape, start=place.start, values=place.view(buffers)) for name, place in self.places.items()}


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
