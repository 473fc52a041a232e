"""What the loop asks of an engine: one whole optimizer step, and its state as parts of named tensors."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol, final

from jaxtyping import Float
from torch import Tensor

from trainer.models.network import Network

LossPerImage = Callable[[Network], Float[Tensor, " b"]]
"""The loss of one micro-batch, each image's own, of the network that it is given."""

Outcome = Literal["applied", "bad", "overflow"]
"""applied: weights and averages have moved; bad: a number was not finite or the loss above its limit, nothing has changed;
overflow: fp16's loss scale was too large and has been lowered, nothing else has changed."""


@final
@dataclass(frozen=True)
class StepResult:
    """What all ranks know after an optimizer step; equal on all of them."""

    outcome: Outcome
    losses: tuple[float, ...]
    """Mean over the images of each micro-batch, by index."""
    gradient_norm: float
    """Euclidean norm of the global batch's gradient before clipping; not finite where the gradient is not."""
    votes: tuple[float, ...]
    """The ranks' votes, added up."""

    @property
    def loss(self) -> float:
        """Mean over the images of the global batch."""
        return sum(self.losses) / len(self.losses)


class Packed(Protocol):
    """Elements that the engine keeps in another form than fp32; packing what was unpacked changes no bit of it."""

    def unpack(self) -> Tensor:
        """A copy in fp32, shaped as the shard's `values`."""
        ...

    def pack(self, values: Tensor) -> None:
        """Take these in the old ones' place. values: on any device, shaped as the shard's `values`."""
        ...


@final
@dataclass(frozen=True, eq=False)
class Shard:
    """What this rank holds of one logical fp32 tensor: elements start, start + 1, ... of its row-major order."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: int
    values: Tensor
    """A view into the engine's memory, to read or to overwrite: of the whole tensor's shape and any strides, or flat.

    Where `packed` is given it has no memory (device meta), only shape and strides."""
    packed: Packed | None = None


State = Mapping[str, Mapping[str, Shard]]
"""By part and tensor name: `model`, `ema` (`ema_1`, ... for further averages) by parameter name; `optimizer` by moment.parameter."""


class NumericError(ArithmeticError):
    """A loss or gradient is not finite, or the loss jumped; no weight was changed."""


class Engine(Protocol):
    """A model, its optimizer and its averages, on some ranks. Every method is collective."""

    def step(
        self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, votes: Sequence[float], loss_limit: float | None
    ) -> StepResult:
        """Optimizer step `step`: accumulate this rank's micro-batches, reduce, judge, clip, update weights and averages.

        losses: this rank's share of the global batch, in index order.
        votes: numbers that are added up over the ranks in a reduction that the step does anyway.
        loss_limit: a mean loss above it is a bad step; None: any finite one is good.
        Raises: PeerLost."""
        ...

    def state(self) -> State:
        """This rank's shards of the fp32 state, views that stay valid for the engine's life."""
        ...

    def restored(self, loss_scale: Mapping[str, float]) -> None:
        """Go on from a state that has been written into `state()`, with the loss scale that belongs to it."""
        ...

    def loss_scale(self) -> Mapping[str, float]:
        """fp16's loss scale and its counter, for the checkpoint; empty otherwise."""
        ...

    def raw(self) -> Network:
        """The model as trained, in evaluation mode and without gradient; for drawing samples. Every call of it is collective."""
        ...

    def averaged(self) -> AbstractContextManager[Network]:
        """The same with the (first) averaged weights, for as long as the context lasts."""
        ...


def judge(losses: Sequence[float], gradient_norm: float, *, loss_limit: float | None, scaled: bool) -> Outcome:
    """Whether a step may change weights: from numbers that all ranks share, so that they decide alike.

    scaled: the gradient carries an fp16 loss scale, so that an infinite one says that the scale is too large."""
    mean = sum(losses) / len(losses)
    if not math.isfinite(mean) or (loss_limit is not None and mean > loss_limit):
        return "bad"
    if not math.isfinite(gradient_norm):
        return "overflow" if scaled else "bad"
    return "applied"


def clip_factor(gradient_norm: float, *, max_gradient_norm: float | None) -> float:
    """What the gradient is multiplied by so that its norm is at most `max_gradient_norm` (None: anything)."""
    return 1.0 if max_gradient_norm is None or gradient_norm <= max_gradient_norm else max_gradient_norm / gradient_norm
