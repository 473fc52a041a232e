"""What the loop asks of a task: a network, its loss on a micro-batch, its pictures, and what its weights mean."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, final

from torch import nn

from data_shards.reading.sample import MicroBatch
from trainer.engines.engine import LossPerImage
from trainer.metrics import Drawn
from trainer.models.attention import Kernels
from trainer.models.network import Network


class Meaning(Protocol):
    """What weights mean, as manifests hold it; a resume with another meaning is refused."""

    def to_json(self) -> dict[str, object]:
        """Plain values by name."""
        ...


class ClassImages(Protocol):
    """Images that the base draws for a run, in RUN_DIR."""

    def make(self, network: Network, *, fresh: bool, asked_to_stop: Callable[[], bool], tick: Callable[[], None]) -> bool:
        """Draw what is missing and pack all; False where the job was asked to stop meanwhile. network: of the base. Collective."""
        ...

    def folder(self) -> Path:
        """Of their shards."""
        ...


class StudentError(Protocol):
    """How far a student is from its teacher, measured now and then; a run may end because of it."""

    every_steps: int
    """Optimizer steps between two measurements, the first before step 0."""

    def error(self, student: Network) -> float:
        """A pure function of the network, which computes without gradient; the same number on every rank. Collective."""
        ...

    def enough(self, errors: Sequence[float]) -> bool:
        """Whether the run ends; errors: all that were measured so far, in order."""
        ...


@final
@dataclass(frozen=True)
class Work:
    """A micro-batch ready for the network."""

    loss: LossPerImage
    draws_sha256: str
    """Of its noise and times, for the ledger."""


@final
@dataclass(frozen=True)
class Task:
    """A network to train and all that is asked of it."""

    module: nn.Module
    units: tuple[nn.Module, ...]
    """What a sharded engine gathers at a time, in the order of the forward pass."""
    micro_batch: Callable[[Sequence[MicroBatch], int, int], Work]
    """(batches, step, index) -> their work, of one micro-batch from each data set; all that is random follows from (seed, step, index)."""
    draw: Callable[[Network, int], Drawn] | None
    """(network, step) -> what it draws from fixed noise, all ranks together; None where there is nothing to look at. Collective."""
    descriptor: Meaning
    attention: Kernels
    flops_per_image: int
    """Of one training step, a teacher included; frozen encoders and activations computed again do not count."""
    class_images: ClassImages | None = None
    """What the base draws before the first step, to be learnt from beside the recipe's data; None: nothing."""
    student_error: StudentError | None = None
    """What may end the run before its last step; None: nothing."""
