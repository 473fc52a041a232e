"""What a source of samples is: a countable, pure function from a number to an image with its texts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class SourceSample:
    """One sample before it is packed: an RGB image of the wanted size and what is known of it."""

    key: str
    image: Image.Image
    caption: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)


class Source(Protocol):
    """Samples 0 .. count-1, each a pure function of its number and the size; can be sent to a worker process."""

    @property
    def count(self) -> int:
        """Number of samples."""
        ...

    def describe(self) -> dict[str, object]:
        """How the samples are made, as JSON; two sources that describe themselves alike give equal samples."""
        ...

    def licence(self) -> dict[str, object]:
        """name, url, creators and text of the licence, as JSON."""
        ...

    def sample(self, number: int, size: int) -> SourceSample:
        """Sample `number` as a size x size image."""
        ...
