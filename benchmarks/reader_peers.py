"""The readers that ours is compared with, each at its fastest: in the order in which its images lie, without an end, nothing shuffled.

All decode with Pillow as their documents do, `Image.open(...).convert("RGB")` and, where images are scaled, `.resize((side, side))`; all
make uint8 batches of the same shape with torch's own collation, which writes into shared memory in a worker process.
"""

import io
import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import cast, final

import datasets
import numpy as np
import torch
import webdataset
from PIL import Image
from reader_images import Case, Stored
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, default_collate
from webdataset.compat import WebDataset

from data_shards.images import image_pixels, scaled_pixels
from data_shards.reading.decode import fitted


@final
class Pillow:
    """Encoded or opened images to batches; side: scale to this many pixels, None leaves them as they are stored."""

    def __init__(self, side: int | None) -> None:
        self._side = side

    def pixels(self, image: Image.Image) -> Tensor:
        """Height, width, RGB."""
        image = image.convert("RGB")
        if self._side is not None:
            image = image.resize((self._side, self._side))
        return torch.from_numpy(np.array(image))

    def decoded(self, content: bytes) -> Tensor:
        """Of one encoded image."""
        return self.pixels(Image.open(io.BytesIO(content)))

    def batch(self, rows: Sequence[Tensor]) -> Tensor:
        """Rows of `pixels`, channels last in memory as ours are."""
        return default_collate(list(rows)).permute(0, 3, 1, 2)

    def batch_of_rows(self, rows: Sequence[Mapping[str, Image.Image]]) -> Tensor:
        """Rows of Hugging Face datasets, which have decoded their images by themselves."""
        return self.batch([self.pixels(row["image"]) for row in rows])


def folder_batches(stored: Stored, case: Case, workers: int) -> Iterator[Tensor]:
    """Files in a folder, read as torchvision's ImageFolder does, behind an ordinary DataLoader."""
    pillow, dataset = Pillow(case.side), _Folder(sorted(stored.folder.iterdir()), Pillow(case.side))
    loader = DataLoader(dataset, case.batch_size, sampler=_Endless(len(dataset)), num_workers=workers, collate_fn=pillow.batch)
    return iter(cast("Iterable[Tensor]", loader))


def webdataset_batches(stored: Stored, case: Case, workers: int) -> Iterator[Tensor]:
    """Stock webdataset on the same tars as ours."""
    pillow = Pillow(case.side)
    urls = [str(stored.index.root / shard.name) for shard in stored.index.shards]
    dataset = WebDataset(urls, shardshuffle=False)
    dataset.repeat()  # keeps it in mind and returns itself
    batched = dataset.to_tuple(stored.extension).map_tuple(pillow.decoded).batched(case.batch_size, collation_fn=_FirstOfEach(pillow))
    loader = DataLoader(cast("IterableDataset[object]", batched), batch_size=None, num_workers=workers)
    return iter(cast("Iterable[Tensor]", loader))


def streaming_batches(stored: Stored, case: Case, workers: int) -> Iterator[Tensor]:
    """Hugging Face datasets, streaming over local Parquet files."""
    rows = datasets.load_dataset("parquet", data_files=list(stored.parquet), split="train", streaming=True)
    assert isinstance(rows, datasets.IterableDataset), "streaming"
    loader = DataLoader(
        cast("IterableDataset[object]", rows.repeat(None)), case.batch_size, num_workers=workers, collate_fn=Pillow(case.side).batch_of_rows
    )
    return iter(cast("Iterable[Tensor]", loader))


def map_style_batches(stored: Stored, case: Case, workers: int) -> Iterator[Tensor]:
    """Hugging Face datasets on Arrow files, map-style."""
    rows = cast("Dataset[object]", datasets.load_from_disk(str(stored.arrow)))
    order = _Endless(len(stored.contents))
    loader = DataLoader(rows, case.batch_size, sampler=order, num_workers=workers, collate_fn=Pillow(case.side).batch_of_rows)
    return iter(cast("Iterable[Tensor]", loader))


def decoding_batches(stored: Stored, case: Case, workers: int) -> Iterator[Tensor]:
    """No reader: our decoder on bytes in memory, in as many processes, and from these nothing but a word that a batch is done."""
    return iter(cast("Iterable[Tensor]", DataLoader(_Decoding(stored, case), batch_size=None, num_workers=workers)))


PEERS = {
    f"webdataset {webdataset.__version__}": webdataset_batches,
    f"datasets {datasets.__version__} streaming": streaming_batches,
    f"datasets {datasets.__version__} map-style": map_style_batches,
    "image folder": folder_batches,
}


@final
class _Folder(Dataset[Tensor]):
    def __init__(self, files: Sequence[Path], pillow: Pillow) -> None:
        self._files = [str(file) for file in files]
        self._pillow = pillow

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Tensor:
        with open(self._files[number], "rb") as file:
            return self._pillow.pixels(Image.open(file))


@final
class _Endless(Sampler[int]):
    """All samples in order, over and over."""

    def __init__(self, samples: int) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[int]:
        return itertools.cycle(range(self._samples))

    def __len__(self) -> int:
        return sys.maxsize


@final
class _FirstOfEach:
    """Collates webdataset's tuples of one."""

    def __init__(self, pillow: Pillow) -> None:
        self._pillow = pillow

    def __call__(self, rows: Sequence[tuple[Tensor]]) -> Tensor:
        return self._pillow.batch([row[0] for row in rows])


@final
class _Decoding(IterableDataset[Tensor]):
    def __init__(self, stored: Stored, case: Case) -> None:
        self._stored = stored
        self._case = case

    def __iter__(self) -> Iterator[Tensor]:
        contents, size, done = self._stored.contents, self._case.batch_size, torch.empty(0)
        for first in itertools.cycle(range(0, len(contents) - size + 1, size)):
            self._decode(contents[first : first + size])
            yield done

    def _decode(self, contents: Sequence[bytes]) -> Tensor:
        extension, stored = self._stored.extension, (self._stored.side, self._stored.side)
        if self._case.side is None:
            return _rows([image_pixels(content, extension, size=stored) for content in contents], self._stored.side)
        wanted = (self._case.side, self._case.side)
        scaled = [scaled_pixels(content, extension, size=stored, least=wanted) for content in contents]
        return fitted(_rows([pixels for pixels, _ in scaled], scaled[0][1][0]), size=wanted)


def _rows(pixels: Sequence[bytes], side: int) -> Tensor:
    return torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8).view(len(pixels), side, side, 3).permute(0, 3, 1, 2)
