"""What the reader hands over: a micro-batch, and the name of a sample that could not be read."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import final

from jaxtyping import UInt8
from torch import Tensor


@final
@dataclass(frozen=True)
class BadSample:
    """Where a sample lies that can't be used, and why; offset: byte of its member's data in the shard."""

    shard: str
    key: str
    offset: int
    reason: str

    def __str__(self) -> str:
        """One line for a message."""
        return f"{self.shard}: sample {self.key!r} at byte {self.offset}: {self.reason}"


@final
class BadSampleError(ValueError):
    """A sample that can't be used, under the policy `raise`; holds its name."""

    def __init__(self, bad: BadSample, mend: str) -> None:
        super().__init__(f"{bad}; {mend}")
        self.bad = bad
        self.mend = mend

    def __reduce__(self) -> tuple[type["BadSampleError"], tuple[BadSample, str]]:
        """Lets a worker process hand it on whole."""
        return BadSampleError, (self.bad, self.mend)


@final
@dataclass(frozen=True)
class MicroBatch:
    """One micro-batch as it was delivered.

    images: 0 .. 255; keys: of the samples really delivered; captions: None where a sample has none; tensors: by extension, such as
    latents.npy, and mask.png as UInt8 [b, 1, h, w] of 0 (kept) and 1 (to be painted); replaced: bad samples that others stand in for.
    What the reader was not asked for is empty: images of 0 x 0 pixels.
    """

    images: UInt8[Tensor, "b c h w"]
    keys: tuple[str, ...]
    captions: tuple[str | None, ...] = ()
    attributes: tuple[Mapping[str, str], ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    replaced: tuple[BadSample, ...] = ()

    def pin_memory(self) -> "MicroBatch":
        """The same with its images and tensors in page-locked memory; what a DataLoader with pin_memory calls."""
        tensors = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return replace(self, images=self.images.pin_memory(), tensors=tensors)
