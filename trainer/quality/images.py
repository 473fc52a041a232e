"""Images of shards by their number, a few at a time: a reference may be larger than the memory."""

from collections.abc import Sequence
from typing import final

from jaxtyping import UInt8
from torch import Tensor

from data_shards.images import DecodeError
from data_shards.index import ShardIndex
from data_shards.reading.sample import BadSampleError
from data_shards.reading.sample_reader import SampleReader


@final
class ShardImages:
    """The images of one index in its order, each brought to a square of `side` pixels."""

    def __init__(self, index: ShardIndex, side: int) -> None:
        self._reader = SampleReader(index)
        self._places = [(shard, position) for shard, count in enumerate(index.samples_per_shard) for position in range(count)]
        self._root, self._size = index.root, (side, side)

    def __len__(self) -> int:
        return len(self._places)

    def read(self, numbers: Sequence[int]) -> UInt8[Tensor, "b 3 h w"]:
        """Images in 0 ... 255, in the order of `numbers`.

        Raises: BadSampleError at the first bad one."""
        places = [self._places[number] for number in numbers]
        try:
            return self._reader.images(places, self._size).contiguous()
        except (DecodeError, OSError) as error:
            for place in places:
                try:
                    self._reader.images([place], self._size)
                except (DecodeError, OSError) as one:
                    bad = self._reader.bad(*place, str(one))
                    raise BadSampleError(bad, f"see `halfstep shards verify {self._root}`, pack again into a new folder") from None
            raise RuntimeError(f"{self._root}: could not be read, and a moment later it could: {error}") from error
