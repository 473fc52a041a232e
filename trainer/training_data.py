"""What a run trains on: its data sets, their order, and the micro-batches of this rank."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

import numpy as np
import torch

from data_shards import ranks
from data_shards.config import CAPTION_EXTENSION, Field, is_image
from data_shards.index import ShardIndex
from data_shards.reading.buckets import bucket_numbers, bucket_sizes
from data_shards.reading.plan import Plan
from data_shards.reading.read import MicroBatches, loader
from data_shards.reading.sample import MicroBatch
from data_shards.remote.store import stores_of
from trainer.config import DataConfig, RunConfig
from trainer.rng import derive_seed

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True)
class TrainingData:
    """The samples of a run as micro-batches of any (step, index); nothing is read before `batches`.

    image_size: side in pixels, of the squares or of a square as large as the buckets' shapes.
    """

    config: DataConfig
    fields: tuple[Field, ...]
    indexes: tuple[ShardIndex, ...]
    plan: Plan
    image_size: int
    sizes: tuple[tuple[int, int], ...] | None

    @classmethod
    def open(
        cls, config: RunConfig, run_dir: Path, *, fields: tuple[Field, ...] = ("image",), classes: str | None = None
    ) -> "TrainingData":
        """The data of a frozen recipe. fields: what a sample is read for; classes: a folder of class images in their stead.

        Raises: ValueError for an index that can't be trusted, images of several sizes without data.image_size, or too few samples.
        """
        data = config.data
        if classes is not None:
            data = data.model_copy(update={"shards": classes, "mixture": ()})
        indexes = tuple(ShardIndex.load(run_dir / name) for name in data.places)
        _check_fields(indexes, fields)
        sizes = _sizes(data)
        plan = Plan(
            tuple(shard.samples for index in indexes for shard in index.shards),
            seed=derive_seed(config.seed, "order" if classes is None else "class order"),
            global_batch_size=data.global_batch_size,
            micro_batch_size=data.micro_batch_size,
            shards_per_set=tuple(len(index.shards) for index in indexes),
            weights=tuple(source.weight for source in data.mixture if source.weight is not None) or None,
            buckets=tuple(number for index in indexes for number in bucket_numbers(index, sizes)) if sizes and len(sizes) > 1 else None,
        )
        if data.aspect_buckets is not None and ranks.is_rank_0():
            _log_buckets(plan, sizes or ())
        return cls(data, fields, indexes, plan, data.image_size or _common_side(indexes), sizes)

    def batches(self, start_step: int, stop_step: int, indices: range, *, pin: bool) -> Iterator[MicroBatch]:
        """The given indices of steps start_step .. stop_step-1, in that order. pin: page-locked memory."""
        read = self._reader(self.fields)
        return iter(loader(read, start_step=start_step, stop_step=stop_step, indices=indices, workers=self.config.workers, pin=pin))

    def micro_batch(self, step: int, index: int) -> MicroBatch:
        """One micro-batch of a run, read now."""
        return self._reader(self.fields)[step, index]

    def examples(self, count: int) -> MicroBatch:
        """The first `count` samples of step 0 at least, captions and images (none where the shards hold none): the same in every run."""
        fields = ("image", "caption") if all(index.holds_images() for index in self.indexes) else ("caption",)
        read, per_batch = self._reader(fields), self.config.micro_batch_size
        enough = min(-(-count // per_batch), self.config.global_batch_size // per_batch)
        batches = [read[0, index] for index in range(enough)]
        return MicroBatch(
            images=torch.cat([batch.images for batch in batches])[:count],
            keys=tuple(key for batch in batches for key in batch.keys)[:count],
            captions=tuple(caption for batch in batches for caption in batch.captions)[:count],
        )

    def _reader(self, fields: tuple[Field, ...]) -> MicroBatches:
        cache = self.config.cache
        return MicroBatches(
            self.indexes,
            self.plan,
            on_bad_sample=self.config.on_bad_sample,
            fields=fields,
            sizes=self.sizes,
            stores=stores_of(self.indexes, cache_folder=cache.folder, limit_gib=cache.limit_gib),
        )


def _check_fields(indexes: tuple[ShardIndex, ...], fields: tuple[Field, ...]) -> None:
    """Raises: ValueError for shards without what the model learns from."""
    for index in indexes:
        held = sorted({extension for shard in index.shards for extension in shard.members})
        if "image" in fields and not any(map(is_image, held)):
            raise ValueError(
                f"{index.root}: holds {', '.join(held)} and no images, which this model learns from; give the shards that were encoded"
            )
        if "caption" in fields and CAPTION_EXTENSION not in held:
            raise ValueError(
                f"{index.root}: holds {', '.join(held)} and no captions, which this model learns from; caption them first "
                "(halfstep shards caption), or give all images one prompt in dreambooth.instance_prompt"
            )


def _sizes(data: DataConfig) -> tuple[tuple[int, int], ...] | None:
    """What images are brought to, a size a bucket; None leaves them as they are."""
    if data.image_size is None:
        return None
    if data.aspect_buckets is None:
        return ((data.image_size, data.image_size),)
    buckets = data.aspect_buckets
    return tuple(bucket_sizes(data.image_size, multiple_of=buckets.multiple_of, max_aspect=buckets.max_aspect))


def _log_buckets(plan: Plan, sizes: tuple[tuple[int, int], ...]) -> None:
    if plan.buckets is None:
        logger.warning("data.aspect_buckets: only squares fit; set a smaller data.aspect_buckets.multiple_of")
        return
    counts = np.bincount(np.concatenate(plan.buckets), minlength=len(sizes))
    listed = ", ".join(f"{width} x {height}: {count}" for (width, height), count in zip(sizes, counts, strict=True))
    logger.info("images by bucket (%d shapes): %s", len(sizes), listed)


def _common_side(indexes: tuple[ShardIndex, ...]) -> int:
    sides = {index.side() for index in indexes}
    if len(sides) > 1:
        listed = ", ".join(f"{index.root.name}: {index.side()}" for index in indexes)
        raise ValueError(f"data.mixture: images of several sizes ({listed} pixels); set data.image_size to bring them to one")
    return sides.pop()
