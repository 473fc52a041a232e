"""What the loop asks of an engine: one whole optimizer step, and its state as named tensors."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from jaxtyping import Float
from torch import Tensor

from trainer.models.tiny_unet import Denoiser

LossPerImage = Callable[[Denoiser], Float[Tensor, " b"]]
"""The loss of one micro-batch, each image's own, of the denoiser that it is given."""


@dataclass(frozen=True)
class StepResult:
    """What all ranks know after an optimizer step; equal on all of them."""

    loss: float
    """Mean over the images of the global batch."""
    gradient_norm: float
    """Euclidean norm of the global batch's gradient before clipping."""
    stop: bool
    """Whether any rank asked to stop."""


class NumericError(ArithmeticError):
    """A loss or gradient is not finite; no weight was changed."""


class Engine(Protocol):
    """A model, its optimizer and its average, on some ranks. Every method is collective."""

    def step(self, step: int, losses: Iterable[LossPerImage], *, learning_rate: float, stop: bool) -> StepResult:
        """Optimizer step `step`: accumulate this rank's micro-batches, reduce, clip, update weights and average.

        losses: this rank's share of the global batch, in index order.
        stop: this rank's wish to stop, told to all ranks in the reduction that the step does anyway.
        Raises: NumericError on all ranks, before any weight changes, naming the micro-batches. PeerLost."""
        ...

    def state_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Full fp32 tensors by part (model, ema, optimizer) and parameter name, the same on any engine."""
        ...

    def load_state_tensors(self, parts: Mapping[str, Mapping[str, Tensor]], *, step: int) -> None:
        """Continue from `state_tensors` as they were after `step` optimizer steps.

        Raises: ValueError if a name or shape is not the model's."""
        ...

    def raw(self) -> Denoiser:
        """The model as trained, in evaluation mode and without gradient; for drawing samples."""
        ...

    def averaged(self) -> AbstractContextManager[Denoiser]:
        """The same with the averaged weights, for as long as the context lasts."""
        ...
