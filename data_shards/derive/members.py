"""Whole samples of shards for captioners and encoders: every member as it stands in the tar, and the image."""

from collections.abc import Mapping
from typing import final

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from data_shards.config import IMAGE_FORMATS
from data_shards.images import DecodeError, scaled_pixels
from data_shards.index import ShardIndex
from data_shards.reading.sample_reader import SampleReader


@final
class MemberReader:
    """The members of shard after shard; each is compared with the index before anybody looks at it."""

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self._reader = SampleReader(index)

    def content(self, shard: int, position: int, extension: str) -> bytes | None:
        """A member's data, None if the sample has none. Raises: DecodeError if it is damaged; ValueError if the shard is missing."""
        self._open(shard)
        return self._reader.content(shard, position, extension)

    def contents(self, shard: int, position: int) -> Mapping[str, bytes]:
        """All members of a sample by extension, in the order of the tar. Raises: as content."""
        columns = self.index.shards[shard].members
        there = sorted((column.offsets[position], extension) for extension, column in columns.items() if column.sizes[position] >= 0)
        return {extension: content for _, extension in there if (content := self.content(shard, position, extension)) is not None}

    def image(self, shard: int, position: int) -> Image.Image:
        """A sample's image as it is stored, upright, in RGB. Raises: DecodeError if it has none or a damaged one; ValueError as content."""
        size = self.index.size_at(self.index.shards[shard], position)
        for extension in IMAGE_FORMATS:
            content = self.content(shard, position, extension)
            if content is not None:
                pixels, found = scaled_pixels(content, extension, size=size, least=size)
                return Image.frombytes("RGB", found, pixels)
        raise DecodeError("it has no image")

    def pixels(self, shard: int, position: int, side: int) -> UInt8[Tensor, "3 h w"]:
        """A sample's image as training sees it: scaled and cropped to a square of this side. Raises: as image."""
        self._open(shard)
        return self._reader.images([(shard, position)], (side, side))[0]

    def _open(self, shard: int) -> None:
        try:
            self._reader.open(shard)
        except FileNotFoundError as error:
            raise ValueError(f"{error.filename} is missing; restore it from a copy (halfstep shards verify {self.index.root})") from None

    def close_but(self, shard: int) -> None:
        """Close the tars of all other shards, which a cache may then give up."""
        self._reader.keep((shard,))
