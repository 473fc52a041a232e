"""The recipe's data section: which images are trained on and how they are dealt out. Free of torch."""

import difflib
import math
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from data_shards.config import CC0, FACE_STYLES
from trainer.config_sections import Count, CountOrZero, Positive, Problem, Section

DataRole = Literal["source", "finetune", "mixture", "teacher_samples"]
DATA_SHA256, MIXTURE_SHA256 = "data.shards sha256", "data.mixture sha256"
"""Of the index or indexes, in a run's identity.json: the same images in another folder are the same."""


class FacesConfig(Section):
    """Embedded source of cartoon faces, packed into RUN_DIR/shards."""

    style: str = "open-peeps"
    """DiceBear style: open-peeps, critters and voxel-art are CC0; toon-head, personas, big-smile and micah need attribution."""
    allow_attribution: bool = False
    """Permit a style whose licence (CC BY 4.0) asks you to name the artist wherever you show the images."""
    count: Count = 6000
    """Number of images."""
    size: Count = 32
    """Width and height of an image in pixels."""
    seed: CountOrZero = 0
    """Seed of the faces; independent of the run's seed."""

    def problems(self) -> Iterator[Problem]:
        style = FACE_STYLES.get(self.style)
        if style is None:
            nearest = difflib.get_close_matches(self.style, FACE_STYLES, 1, 0.5)
            hint = f" - did you mean '{nearest[0]}'?" if nearest else ""
            yield Problem(("style",), f"got '{self.style}', wanted one of {', '.join(FACE_STYLES)}{hint}")
        elif style.licence != CC0 and not self.allow_attribution:
            text = f"'{self.style}' is {style.licence}: {style.creator} must be named wherever its images are shown"
            yield Problem(("style", "allow_attribution"), f"{text}; set data.faces.allow_attribution=true")


class MixtureSource(Section):
    """One of several data sets that are trained on together."""

    shards: str
    """Directory or URL of packed shards, as data.shards."""
    weight: Positive | None = None
    """Share of its samples, relative to the others' weights; null, for all of them: as many as there are."""


class AspectBucketsConfig(Section):
    """Shapes of about image_size x image_size pixels; each image goes into the one nearest to its own, and no micro-batch mixes them."""

    multiple_of: Count = 64
    """Every side is a multiple of so many pixels; it divides image_size."""
    max_aspect: Annotated[float, Field(ge=1, le=8)] = 2.0
    """Longest side over shortest side of the longest shapes, from 1 to 8."""


class CacheConfig(Section):
    """Where each node keeps shards that it reads from a remote store. Free to change on a resume."""

    folder: str | None = None
    """Folder on the node's own disk; null: $HALFSTEP_CACHE, else halfstep below $XDG_CACHE_HOME or ~/.cache."""
    limit_gib: Positive | None = None
    """Disk space that it may take, in GiB; shards that no rank needs any more make room. Null: no limit."""


class DataConfig(Section):
    """Training images and how they are dealt into micro-batches."""

    shards: str | None = None
    """Directory of packed shards, or where one lies: hf://datasets/OWNER/NAME, s3://, gs://, az:// or https://; null packs `data.faces`."""
    mixture: Annotated[tuple[MixtureSource, ...], Field(strict=False)] = ()
    """Several data sets in the stead of data.shards, mixed evenly, each with its weight."""
    faces: FacesConfig | None = None
    """Faces to pack into the run's own directory when there are no other shards."""
    role: DataRole | None = None
    """What the images are to a fine-tuned teacher: those of its source, of its fine-tuning, a mixture of both, or its own samples."""
    image_size: Count | None = None
    """Side in pixels that images are brought to when they are read, the longer side cut off evenly; null: as they are stored."""
    aspect_buckets: AspectBucketsConfig | None = None
    """Train on several shapes instead of squares; null: squares."""
    global_batch_size: Count = 32
    """Images per optimizer step over all ranks; a multiple of micro_batch_size."""
    micro_batch_size: Count = 16
    """Images per rank per forward. Ranks divide global_batch_size / micro_batch_size micro-batches evenly."""
    workers: CountOrZero = 0
    """Reading processes per rank; 0 reads in the training process. Free to change on a resume."""
    horizontal_flip: bool = False
    """Mirror half of the images, chosen anew each epoch."""
    on_bad_sample: Literal["raise", "skip"] = "raise"
    """raise: a damaged sample ends the run; skip: another sample takes its place, by the same rule on every rank."""
    max_bad_samples: CountOrZero = 100
    """Samples that may be skipped before the run ends; counts for on_bad_sample skip."""
    cache: CacheConfig = CacheConfig()
    """Of remote shards, on each node."""

    @property
    def places(self) -> tuple[str, ...]:
        """Where all shards lie, of a mixture or of one data set; none where data.faces are yet to be packed."""
        return tuple(source.shards for source in self.mixture) or ((self.shards,) if self.shards is not None else ())

    def problems(self) -> Iterator[Problem]:
        if self.global_batch_size % self.micro_batch_size:
            nearest = max(1, round(self.global_batch_size / self.micro_batch_size)) * self.micro_batch_size
            text = f"{self.global_batch_size} is not a multiple of micro_batch_size={self.micro_batch_size}"
            yield Problem(("global_batch_size", "micro_batch_size"), f"{text}; set data.global_batch_size={nearest}")
        given = [name for name, value in (("shards", self.shards), ("mixture", self.mixture)) if value]
        if len(given) > 1:
            yield Problem(("mixture", "shards"), "data.shards and data.mixture are both given; keep one of them")
        if self.role == "mixture" and not self.mixture:
            yield Problem(
                ("role", "mixture"), "data.role=mixture, but data.mixture is empty; list the source's shards and the fine-tuning's"
            )
        weighted = [source.weight is not None for source in self.mixture]
        if any(weighted) and not all(weighted):
            text = f"{sum(weighted)} of {len(weighted)} data sets have a weight; give one to each, or to none for as many as there are"
            yield Problem(("mixture",), text)
        if self.aspect_buckets is not None:
            yield from _bucket_problems(self.image_size, self.aspect_buckets)


def _bucket_problems(image_size: int | None, buckets: AspectBucketsConfig) -> Iterator[Problem]:
    if image_size is None:
        yield Problem(("image_size", "aspect_buckets"), "null, but data.aspect_buckets wants a size; set data.image_size=512 or another")
    elif image_size % buckets.multiple_of:
        text = f"{buckets.multiple_of} does not divide data.image_size={image_size}"
        nearest = math.gcd(image_size, buckets.multiple_of)
        yield Problem(("aspect_buckets.multiple_of", "image_size"), f"{text}; set data.aspect_buckets.multiple_of={nearest}")
