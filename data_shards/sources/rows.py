"""What a source of samples is: rows that can be read part by part, each part in a process of its own."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from PIL import Image


@dataclass(frozen=True)
class Row:
    """One row as it is found: its image, and what is known of it.

    key: of letters, digits, - and _, of no other sample of the source; image: encoded bytes (JPEG, PNG or WebP, not yet checked), or an
    RGB image drawn at the wanted size; where: its name in messages, such as a path or a table's row ("" for the key); mask: encoded
    bytes of a picture of the image's size, white where it is to be painted, not yet checked.
    """

    key: str
    image: Image.Image | bytes
    caption: str | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    where: str = ""
    mask: bytes | None = None


@dataclass(frozen=True)
class UnreadableRow:
    """A row that is no sample, and why; the pack goes on without it where it may."""

    key: str
    reason: str
    where: str = ""


@dataclass(frozen=True)
class Part:
    """Consecutive rows that are read together: `count` rows from row `first` on, of file `file` (0 where there are no files).

    count: None for all the rest, where nobody knows how many there are.
    """

    file: int
    first: int
    count: int | None


class RowSource(Protocol):
    """Rows in a fixed order; can be sent to a worker process, and reads nothing until it is asked to."""

    @property
    def count(self) -> int | None:
        """Number of rows; None where it is not known before they are read."""
        ...

    def describe(self) -> dict[str, object]:
        """How the rows are made, as JSON, with a `kind`; two sources that describe themselves alike give equal rows."""
        ...

    def licence(self) -> dict[str, object]:
        """name, url, creators and text of the licence, as JSON."""
        ...

    def parts(self, rows: int) -> Sequence[Part]:
        """All rows, in order, as parts of about `rows` rows."""
        ...

    def read(self, part: Part, size: int | None) -> Iterator[Row | UnreadableRow]:
        """The rows of a part, in order; size: the wanted side of images in pixels, for sources that draw them.

        Raises: ValueError or OSError where the part as a whole can't be read.
        """
        ...


def even_parts(count: int, rows: int) -> list[Part]:
    """Rows 0 .. count-1 of the one file 0 as parts of `rows` rows."""
    return [Part(0, first, min(rows, count - first)) for first in range(0, count, rows)]
