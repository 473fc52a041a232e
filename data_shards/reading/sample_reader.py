"""Single samples by (shard, position), straight from the tars; every byte is compared with the index before it is decoded."""

import os
from collections.abc import Container, Iterable, Mapping, Sequence
from io import FileIO
from typing import final
from zlib import crc32

import torch
from jaxtyping import UInt8
from torch import Tensor

from data_shards.config import ATTRIBUTES_EXTENSION, CAPTION_EXTENSION, IMAGE_FORMATS, MASK_EXTENSION
from data_shards.images import DecodeError, image_pixels, mask_pixels, scaled_pixels
from data_shards.index import Members, Shard, ShardIndex
from data_shards.reading.decode import attribute_strings, caption_text, fitted_images, fitted_masks, images_tensor, tensor_of
from data_shards.reading.lines import Place
from data_shards.reading.sample import BadSample
from data_shards.remote.retry import WrongContentError
from data_shards.remote.store import Store, stores_of
from data_shards.tars.tar import BLOCK_BYTES, header_member, header_problem

OPEN_FILES = 256  # well under the usual limit of 1,024 a process
READ_AHEAD_BYTES = 2**28  # a shard up to this size is asked into the page cache when it is opened


@final
class SampleReader:
    """Parts of single samples of one or several indexes, whose shards are numbered through.

    stores: where each index's tars lie, by default where the index says. A copy sent to another process opens its own files.
    """

    def __init__(self, indexes: ShardIndex | Sequence[ShardIndex], *, stores: Sequence[Store] | None = None) -> None:
        self.indexes = (indexes,) if isinstance(indexes, ShardIndex) else tuple(indexes)
        stores = stores_of(self.indexes) if stores is None else stores
        self.shards = [shard for index in self.indexes for shard in index.shards]
        self.keys = [shard.keys for shard in self.shards]
        self._index_of = [index for index in self.indexes for _ in index.shards]
        self._stores = [store for index, store in zip(self.indexes, stores, strict=True) for _ in index.shards]
        self._images = [_of(shard, IMAGE_FORMATS) for shard in self.shards]
        self._texts = [shard.members for shard in self.shards]
        sides = {index.image_size for index in self.indexes}
        side = sides.pop() if len(sides) == 1 else None
        self._size = None if side is None else (side, side)  # of every image as it is stored
        self._files: dict[int, FileIO] = {}
        self._wrong: dict[int, str] = {}

    def __getstate__(self) -> dict[str, object]:
        """Everything but the open files."""
        return {**self.__dict__, "_files": {}}

    def are_open(self, places: Sequence[Place]) -> bool:
        """Whether the tars of all these samples are open."""
        files = self._files
        return all(shard in files for shard, _ in places)

    def open(self, shard: int) -> FileIO:
        """The shard's tar; when it is opened, its bytes are asked into the page cache.

        Raises: OSError if it can't be opened; DecodeError if a remote store has another content there; FetchError if it can't be reached.
        """
        file = self._files.get(shard)
        if file is None:
            if shard in self._wrong:
                raise DecodeError(self._wrong[shard])
            if len(self._files) >= OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
            try:
                file = self._stores[shard].open(self.shards[shard])
            except WrongContentError as error:
                self._wrong[shard] = str(error)
                raise DecodeError(str(error)) from None
            self._files[shard] = file
            if self.shards[shard].size_bytes <= READ_AHEAD_BYTES:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
        return file

    def prefetch(self, shard: int) -> None:
        """Has a shard brought near without waiting for it; whatever is wrong with it is said when it is read."""
        if shard not in self._files and shard not in self._wrong:
            self._stores[shard].prefetch(self.shards[shard])

    def keep(self, shards: Container[int]) -> None:
        """Closes the tars of all others, which a cache may then give up."""
        for shard in [shard for shard in self._files if shard not in shards]:
            self._stores[shard].release(self._files.pop(shard))

    def images(
        self, places: Sequence[Place], size: tuple[int, int] | None = None, memory: UInt8[Tensor, " n"] | None = None
    ) -> UInt8[Tensor, "b c h w"]:
        """Each sample's image as it is stored; size: brought to this width and height, its edges cut off where the shape differs.

        memory: where the pixels are put, by default into memory of their own.

        Raises: DecodeError, OSError, FetchError; ShardIndexError without a size where the images are not squares of one.
        """
        # All are read, then all decoded: by turns each would push the other's code and tables out of a busy core's cache.
        encoded = self._encoded(places)
        if size is None:
            side = self.indexes[0].side()
            size = (side, side)
        if size == self._size:
            pixels = (image_pixels(content, extension, size=size) for content, extension in encoded)
            return images_tensor(pixels, len(encoded), size=size, memory=memory)
        sizes = (self._index_of[shard].size_at(self.shards[shard], position) for shard, position in places)
        found = zip(encoded, sizes, strict=True)
        scaled = [scaled_pixels(content, extension, size=stored, least=size) for (content, extension), stored in found]
        return fitted_images(scaled, size=size, memory=memory)

    def masks(self, places: Sequence[Place], size: tuple[int, int] | None = None) -> UInt8[Tensor, "b 1 h w"]:
        """Each sample's mask, brought to what `images` brings its image to; 1: to be painted, 0: kept.

        Raises: as images; DecodeError if a sample has none or one of another size than its image.
        """
        if size is None:
            side = self.indexes[0].side()
            size = (side, side)
        found: list[tuple[bytes, tuple[int, int]]] = []
        for shard, position in places:
            content = self.content(shard, position, MASK_EXTENSION)
            if content is None:
                raise DecodeError(f"it has no {MASK_EXTENSION}")
            stored = self._index_of[shard].size_at(self.shards[shard], position)
            found.append((mask_pixels(content, size=stored), stored))
        return fitted_masks(found, size=size)

    def tensors(self, places: Sequence[Place], extension: str) -> Tensor:
        """The numbers of each sample's member of this extension, one above the other; all are of one shape.

        Raises: DecodeError if one is missing or damaged; ValueError if their shapes differ; OSError, FetchError.
        """
        found: list[Tensor] = []
        for shard, position in places:
            content = self.content(shard, position, extension)
            if content is None:
                raise DecodeError(f"it has no {extension}")
            tensor = tensor_of(content)
            if found and tensor.shape != found[0].shape:
                bad = self.bad(
                    shard, position, f"its {extension} is of shape {tuple(tensor.shape)}, that of others {tuple(found[0].shape)}"
                )
                raise ValueError(f"{bad}; encode all shards with one --size")
            found.append(tensor)
        return torch.stack(found)

    def caption(self, shard: int, position: int) -> str | None:
        """A sample's caption, None if it has none. Raises: DecodeError, OSError, FetchError."""
        content = self.content(shard, position, CAPTION_EXTENSION)
        return None if content is None else caption_text(content)

    def attributes(self, shard: int, position: int) -> Mapping[str, str]:
        """A sample's attributes, empty if it has none. Raises: DecodeError, OSError, FetchError."""
        content = self.content(shard, position, ATTRIBUTES_EXTENSION)
        return {} if content is None else attribute_strings(content)

    def content(self, shard: int, position: int, extension: str) -> bytes | None:
        """Data of one member, after its header, data and padding were compared with the index's crc32; None if there is none.

        Raises: DecodeError saying which of them is damaged; OSError, FetchError.
        """
        members = self._texts[shard].get(extension)
        if members is None or members.sizes[position] < 0:
            return None
        size = members.sizes[position]
        block = os.pread(self.open(shard).fileno(), _block_bytes(size), members.offsets[position] - BLOCK_BYTES)
        if crc32(block) != members.crc32[position]:
            raise DecodeError(self._damage(block, shard, position, extension))
        return block[BLOCK_BYTES : BLOCK_BYTES + size]

    def bad(self, shard: int, position: int, reason: str) -> BadSample:
        """The name of a sample that could not be read."""
        entry = self.shards[shard]
        offset = next((members.offsets[position] for _, members in self._images[shard] if members.sizes[position] >= 0), 0)
        return BadSample(entry.name, entry.keys[position], offset, reason)

    def _encoded(self, places: Sequence[Place]) -> list[tuple[bytes, str]]:
        """Each sample's image as it stands in its tar, checked like `content` (and without its calls), with its extension."""
        encoded: list[tuple[bytes, str]] = []
        images, files = self._images, self._files
        for shard, position in places:
            for extension, members in images[shard]:
                size = members.sizes[position]
                if size < 0:
                    continue
                file = files.get(shard) or self.open(shard)
                block = os.pread(file.fileno(), _block_bytes(size), members.offsets[position] - BLOCK_BYTES)
                if crc32(block) != members.crc32[position]:
                    raise DecodeError(self._damage(block, shard, position, extension))
                encoded.append((block[BLOCK_BYTES : BLOCK_BYTES + size], extension))
                break
            else:
                raise DecodeError("it has no image")
        return encoded

    def _damage(self, block: bytes, shard: int, position: int, extension: str) -> str:
        """What differs between a member's bytes and what the index says of it."""
        entry = self.shards[shard]
        members, name = entry.members[extension], f"{entry.keys[position]}.{extension}"
        size, missing = members.sizes[position], _block_bytes(members.sizes[position]) - len(block)
        if missing > 0:
            return f"the shard is cut: it ends {missing} bytes before {name} does"
        header = block[:BLOCK_BYTES]
        problem = header_problem(header)
        if problem is not None:
            return f"its tar header is damaged: {problem}"
        found = header_member(header, members.offsets[position] - BLOCK_BYTES)
        if (found.name, found.size) != (name, size):
            return f"the tar holds {found.name!r} of {found.size} bytes here, the index says {name!r} of {size}"
        return f"the bytes of {name} do not match the crc32 in the index: they were changed after packing"


def _block_bytes(size: int) -> int:
    """Header, data and padding of a member."""
    return (size + 2 * BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES


def _of(shard: Shard, extensions: Iterable[str]) -> tuple[tuple[str, Members], ...]:
    return tuple((extension, shard.members[extension]) for extension in extensions if extension in shard.members)
