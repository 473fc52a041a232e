"""One row of a source to the members of a sample, or the reason why it is left out."""

import hashlib
import json
from dataclasses import dataclass
from typing import Literal, final

from data_shards.config import (
    ATTRIBUTES_EXTENSION,
    CAPTION_EXTENSION,
    MASK_EXTENSION,
    MAX_ATTRIBUTES_BYTES,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
)
from data_shards.packing.filters import DropReason, Filters
from data_shards.packing.fit import UNFIT, Fit, Fitted, fit_drawn, fit_image, fit_mask, open_image, pixels_sha256, upright_size
from data_shards.packing.write import Block, block
from data_shards.sources.rows import Row, UnreadableRow

Dedupe = Literal["off", "bytes", "pixels"]


@final
@dataclass(frozen=True)
class Preparation:
    """What is done to every row; dedupe: what two rows share that are one sample: the file's bytes, or the pixels as packed."""

    fit: Fit
    filters: Filters
    dedupe: Dedupe = "off"


@final
@dataclass(frozen=True)
class Prepared:
    """A sample as it is packed; sha256: of what `dedupe` compares, "" where it is off."""

    key: str
    blocks: tuple[Block, ...]
    size: tuple[int, int]
    sha256: str


def prepared(row: Row | UnreadableRow, how: Preparation) -> Prepared | DropReason | UnreadableRow:
    """The sample of a row; to be called under fit.image_warnings()."""
    if isinstance(row, UnreadableRow):
        return row
    reason = how.filters.caption_reason(row.caption)
    if reason is not None:
        return reason
    try:
        fitted = _fitted(row, how)
        if not isinstance(fitted, Fitted):
            return fitted
        blocks = _blocks(row, fitted, _mask(row, how.fit))
    except UNFIT as error:
        return UnreadableRow(row.key, f"can't be decoded ({str(error) or type(error).__name__})", row.where)
    match how.dedupe:
        case "off":
            sha256 = ""
        case "bytes" if isinstance(row.image, bytes):
            sha256 = hashlib.sha256(row.image).hexdigest()
        case _:
            sha256 = pixels_sha256(fitted.pixels)
    return Prepared(row.key, blocks, fitted.pixels.size, sha256)


def _fitted(row: Row, how: Preparation) -> Fitted | DropReason:
    if not isinstance(row.image, bytes):
        return how.filters.size_reason(*row.image.size) or fit_drawn(row.image, how.fit)
    with open_image(row.image) as image:
        return how.filters.size_reason(*image.size) or fit_image(image, how.fit, row.image)


def _mask(row: Row, fit: Fit) -> bytes | None:
    if row.mask is None:
        return None
    if not isinstance(row.image, bytes):
        return fit_mask(row.mask, fit, image_size=row.image.size)
    with open_image(row.image) as image:
        return fit_mask(row.mask, fit, image_size=upright_size(image))


def _blocks(row: Row, fitted: Fitted, mask: bytes | None) -> tuple[Block, ...]:
    """The members: the image, mask and caption if there are any, and always the attributes. Raises: ValueError if one is too long."""
    texts: dict[str, object] = {**row.extra, "attributes": dict(row.attributes)}
    members: list[tuple[str, bytes, int]] = [(fitted.extension, fitted.content, MAX_IMAGE_BYTES)]
    if mask is not None:
        members.append((MASK_EXTENSION, mask, MAX_IMAGE_BYTES))
    if row.caption is not None:
        members.append((CAPTION_EXTENSION, row.caption.encode(), MAX_CAPTION_BYTES))
        texts["caption"] = row.caption
    members.append((ATTRIBUTES_EXTENSION, json.dumps(texts, sort_keys=True).encode(), MAX_ATTRIBUTES_BYTES))
    for extension, content, limit in members:
        if len(content) > limit:
            raise ValueError(f"its .{extension} has {len(content)} bytes, at most {limit} are allowed")
    return tuple(block(row.key, extension, content) for extension, content, _ in members)
