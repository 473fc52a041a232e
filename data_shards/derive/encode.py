"""`halfstep shards encode`: frozen encoders make latents and embeddings of every sample, on all ranks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import diffusers
import torch
import transformers
from jaxtyping import UInt8
from torch import Tensor

from data_shards import ranks
from data_shards.config import CAPTION_EXTENSION
from data_shards.derive.derive import DONE, Asked, Beat, derive
from data_shards.derive.members import MemberReader
from data_shards.derive.request import DeriveJob, EncodeRequest, is_finished
from data_shards.encoders.image import ImageEncoder, image_encoder
from data_shards.encoders.npy import mask_bytes, npy_bytes
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.images import DecodeError
from data_shards.index import Json
from data_shards.reading.decode import caption_text

LATENTS, TEXT, POOLED, TEXT_MASK, IMAGE = "latents.npy", "text.npy", "pooled.npy", "text_mask.npy", "image.npy"


def encode_job(run_dir: Path, options: Mapping[str, object], stop: Asked, beat: Beat) -> int:
    """What each rank does: encode the shards that OUT/run/derive.json names. Collective."""
    job = DeriveJob.read(run_dir)
    assert isinstance(job.request, EncodeRequest), "an encode job has an encode request"
    if is_finished(run_dir.parent):
        return DONE
    beat.phase("import", 0)  # may last: gigabytes are downloaded and loaded
    encoders = Encoders(job.request, device=ranks.device())
    return derive(job, run_dir.parent, encoders, stop=stop, beat=beat)


@final
@dataclass(frozen=True)
class Raw:
    """What encoders need of a sample; None for what none of them looks at."""

    image: UInt8[Tensor, "3 h w"] | None
    caption: str | None


@final
class Encoders:
    """The encoders of a request, all run on the same batch."""

    def __init__(self, request: EncodeRequest, *, device: torch.device) -> None:
        """Load them. Raises: ValueError for a model that is not there, or of another kind."""
        self._request = request
        precision = request.precision
        self._vae = LatentEncoder(request.vae, precision=precision, device=device) if request.vae else None
        self._text = (
            TextEncoder(
                request.text_encoder,
                layer=request.text_layer,
                tokens=request.text_tokens,
                masks=request.text_mask,
                precision=precision,
                device=device,
            )
            if request.text_encoder
            else None
        )
        self._image: ImageEncoder | None = (
            image_encoder(request.image_encoder, precision=precision, device=device) if request.image_encoder else None
        )
        self._device = device

    @property
    def extensions(self) -> Sequence[str]:
        """Of what is stored."""
        text = [TEXT, *([POOLED] if self._request.pooled else []), *([TEXT_MASK] if self._request.text_mask else [])]
        return [*([LATENTS] if self._vae else []), *(text if self._text else []), *([IMAGE] if self._image else [])]

    @property
    def keeps_images(self) -> bool:
        """As asked."""
        return self._request.keep_images

    @property
    def models(self) -> Json:
        """The encoders by the member that they make: name, sha256, and what a reader must know."""
        made = {LATENTS: self._vae, TEXT: self._text, IMAGE: self._image}
        return {extension: encoder.to_json() for extension, encoder in made.items() if encoder is not None}

    def read(self, reader: MemberReader, shard: int, position: int) -> Raw:
        """The image, cropped and scaled as training does it, and the caption. Raises: DecodeError if one is missing or damaged."""
        image = reader.pixels(shard, position, self._request.size) if self._vae or self._image else None
        if not self._text:
            return Raw(image, None)
        content = reader.content(shard, position, CAPTION_EXTENSION)
        if content is None:
            raise DecodeError("it has no caption")
        return Raw(image, caption_text(content))

    def make(self, samples: Sequence[Raw]) -> list[tuple[Mapping[str, bytes], object]]:
        """The members of each sample; its note: the shape of each, and whether the caption was too long."""
        columns: dict[str, Tensor] = {}
        cut = [False] * len(samples)
        images = [sample.image for sample in samples if sample.image is not None]
        if self._vae is not None:
            columns[LATENTS] = self._vae.encode(torch.stack(images))
        if self._image is not None:
            columns[IMAGE] = self._image.encode(torch.stack(images))
        if self._text is not None:
            text = self._text.encode([sample.caption for sample in samples if sample.caption is not None])
            columns[TEXT], cut = text.hidden, text.cut
            if self._request.pooled:
                if text.pooled is None:
                    raise ValueError(f"--pooled: {self._request.text_encoder} has no pooled embedding; leave it out")
                columns[POOLED] = text.pooled
            if self._request.text_mask:
                columns[TEXT_MASK] = text.mask
        shapes = {extension: list(column.shape[1:]) for extension, column in columns.items()}
        return [(self._members(columns, row), [shapes, int(cut[row])]) for row in range(len(samples))]

    def facts(self, notes: Sequence[object]) -> Json:
        """How it was made, and the shape of each member."""
        match notes[0]:
            case [dict(shapes), int()]:
                members = {
                    extension: {"shape": shape, "dtype": _dtype(extension, self._request.dtype)} for extension, shape in shapes.items()
                }
            case other:
                raise AssertionError(f"an encoder's note is {other!r}")
        cut = sum(note[-1] for note in notes if isinstance(note, list))
        return {
            "members": members,
            "size": self._request.size,
            "crop": "centre",
            "device": self._device.type,
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
            **({"counts": {"captions_cut": cut}} if self._text else {}),
        }

    def _members(self, columns: Mapping[str, Tensor], row: int) -> dict[str, bytes]:
        return {
            extension: mask_bytes(column[row]) if extension == TEXT_MASK else npy_bytes(column[row], self._request.dtype)
            for extension, column in columns.items()
        }


def _dtype(extension: str, stored: str) -> str:
    return "uint8" if extension == TEXT_MASK else {"fp16": "float16", "fp32": "float32"}[stored]
