"""What is in a folder of shards: a summary for people and programs, and a contact sheet."""

import json
from collections import Counter
from pathlib import Path
from zlib import crc32

from PIL import Image

from data_shards.config import ATTRIBUTES_EXTENSION, CAPTION_EXTENSION, IMAGE_FORMATS
from data_shards.images import DecodeError, image_pixels
from data_shards.index import Shard, ShardIndex
from data_shards.keyed import permutation
from data_shards.remote.store import store_of
from data_shards.tars.tar import BLOCK_BYTES, padded

SHEET_GAP_PIXELS = 2
SHEET_LARGEST_PIXELS = 192
COUNTED_SAMPLES = 2000  # attributes are counted on at most so many samples: about 0.1 s


def summary(index: ShardIndex) -> dict[str, object]:
    """Counts, sizes, licence and origin, and how often each attribute value comes among the first samples."""
    samples = index.samples
    return {
        "folder": str(index.root),
        "samples": samples,
        "shards": len(index.shards),
        "samples_per_shard": {"least": min(index.samples_per_shard), "most": max(index.samples_per_shard)},
        "bytes": sum(shard.size_bytes for shard in index.shards),
        "image_size": index.image_size,
        "with_caption": sum(_having(shard, CAPTION_EXTENSION) for shard in index.shards),
        "with_attributes": sum(_having(shard, ATTRIBUTES_EXTENSION) for shard in index.shards),
        "licence": dict(index.licence),
        "source": dict(index.source),
        "pack": dict(index.pack),
        "sha256": index.sha256,
        "attributes": attribute_counts(index, limit=COUNTED_SAMPLES),
        "derived": [dict(entry) for entry in index.derived],
        "location": index.location,
    }


def attribute_counts(index: ShardIndex, *, limit: int) -> dict[str, dict[str, int]]:
    """How often each value of each attribute comes among the first `limit` samples, most frequent first."""
    counts: dict[str, Counter[str]] = {}
    for content in _contents(index, ATTRIBUTES_EXTENSION, limit):
        for name, value in json.loads(content).get("attributes", {}).items():
            counts.setdefault(name, Counter())[str(value)] += 1
    return {name: dict(counter.most_common()) for name, counter in sorted(counts.items())}


def contact_sheet(index: ShardIndex, *, rows: int = 8, columns: int = 12, seed: int = 0) -> Image.Image:
    """Some samples, drawn by seed, side by side; images under 64 pixels are shown at twice their size.

    Raises: ValueError naming a sample whose image can't be shown.
    """
    shown = min(rows * columns, index.samples)
    shown_size = index.image_size or SHEET_LARGEST_PIXELS
    shown_size = min(shown_size * (2 if shown_size < 64 else 1), SHEET_LARGEST_PIXELS)
    cell = shown_size + SHEET_GAP_PIXELS
    sheet = Image.new("RGB", (columns * cell + SHEET_GAP_PIXELS, -(-shown // columns) * cell + SHEET_GAP_PIXELS), "white")
    places = [(shard, position) for shard in index.shards for position in range(shard.samples)]
    for number, place in enumerate(permutation(len(places), seed, "contact sheet")[:shown]):
        shard, position = places[place]
        image = shown_image(index, shard, position, shown_size)
        left, top = (at * cell + SHEET_GAP_PIXELS for at in (number % columns, number // columns))
        sheet.paste(image, (left + (shown_size - image.width) // 2, top + (shown_size - image.height) // 2))
    return sheet


def write_contact_sheet(index: ShardIndex, path: str | Path, *, rows: int = 8, columns: int = 12) -> None:
    """Writes the contact sheet as a PNG."""
    contact_sheet(index, rows=rows, columns=columns).save(path, format="PNG")


def shown_image(index: ShardIndex, shard: Shard, position: int, side: int) -> Image.Image:
    """A sample's whole image, its longer side `side` pixels.

    Raises: ValueError naming the sample if it has no image or a damaged one.
    """
    for extension in IMAGE_FORMATS:
        content = _content(index, shard, position, extension)
        if content is None:
            continue
        size = index.size_at(shard, position)
        try:
            image = Image.frombytes("RGB", size, image_pixels(content, extension, size=size))
        except DecodeError as error:
            raise ValueError(f"{shard.name}: sample {shard.keys[position]!r}: {error}; see `halfstep shards verify {index.root}`") from None
        longer = max(size)
        shown = (max(1, image.width * side // longer), max(1, image.height * side // longer))
        return image.resize(shown, Image.Resampling.NEAREST if side > longer else Image.Resampling.LANCZOS)
    raise ValueError(f"{shard.name}: sample {shard.keys[position]!r} has no image; see `halfstep shards verify {index.root}`")


def _having(shard: Shard, extension: str) -> int:
    members = shard.members.get(extension)
    return 0 if members is None else sum(size >= 0 for size in members.sizes)


def _contents(index: ShardIndex, extension: str, limit: int) -> list[bytes]:
    places = [(shard, position) for shard in index.shards for position in range(shard.samples)][:limit]
    contents = (_content(index, shard, position, extension) for shard, position in places)
    return [content for content in contents if content is not None]


def _content(index: ShardIndex, shard: Shard, position: int, extension: str) -> bytes | None:
    """Data of one member as it stands in the tar, wherever that lies.

    Raises: ValueError if the tar is missing, or its bytes there are not those of the index."""
    members = shard.members.get(extension)
    if members is None or members.sizes[position] < 0:
        return None
    try:
        with store_of(index).open(shard) as file:
            file.seek(members.offsets[position] - BLOCK_BYTES)
            block = file.read(BLOCK_BYTES + padded(members.sizes[position]))
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing; see `halfstep shards verify {index.root}`") from None
    if crc32(block) != members.crc32[position]:
        what = f"{shard.name}: sample {shard.keys[position]!r}: its .{extension} is cut or was changed after packing"
        raise ValueError(f"{what}; see `halfstep shards verify {index.root}`")
    return block[BLOCK_BYTES : BLOCK_BYTES + members.sizes[position]]
