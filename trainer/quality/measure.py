"""What one entry of an evaluation is measured by: drawing its images on all ranks, and the numbers made of them."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from data_shards import ranks
from data_shards.files import replace_file
from trainer.evaluation import EvaluationRow, Yardstick
from trainer.frechet import frechet_distance, mean_and_covariance
from trainer.pictures import PICTURES, PICTURES_SEED, Entry, predictor, rank_seconds_per_image, warm_up
from trainer.quality.discrepancy import SUBSETS, cmmd, kernel_distance, subset_distances, subset_images
from trainer.quality.manifold import NEIGHBOURS, share_within, squared_radii
from trainer.quality.memorisation import Training, find_neighbours, neighbours_sheet
from trainer.quality.nets import FacesFeatures, ImageFeatures, TransformerFeatures
from trainer.quality.perceptual import COMPARED_IMAGES, distances
from trainer.quality.rows import batches_of_rank, gather_rows, on_ranks
from trainer.quality.statistics import Reference, cached
from trainer.quality.timing import time_batches
from trainer.sample import Told, draw_share, png

logger = logging.getLogger(__name__)


@final
@dataclass(frozen=True, eq=False)
class Measure:
    """What every row is measured with. attributes: the net that reads them, None where the reference has none; clip: for CMMD.

    measured_up_to: steps above which only seconds are measured. time_batches: batch sizes to be timed. out: the evaluation's file."""

    net: ImageFeatures
    reference: Reference
    attributes: FacesFeatures | None
    clip: tuple[TransformerFeatures, Float[Tensor, "b e"]] | None
    training: Training | None
    images: int
    seed: int
    batch_size: int
    measured_up_to: int
    time_batches: tuple[int, ...]
    cache: Path
    out: Path

    @property
    def yardstick(self) -> Yardstick:
        """What rows of this measure carry."""
        return Yardstick(self.net.name, self.reference.name.rpartition("@")[2], self.images, self.seed)

    def serves(self, row: EvaluationRow, entry: Entry) -> bool:
        """Whether a row that is there already says all that this measure would of an entry."""
        if row.weights_sha256 != entry.source.weights_sha256 or not {timing.batch_images for timing in row.timings} >= {*self.time_batches}:
            return False
        if entry.steps > self.measured_up_to:
            return True
        return (
            row.kid_mean is not None
            and (self.clip is None or row.cmmd_net == self.clip[0].name)
            and (self.training is None or row.training == self.training.name)
        )


@final
@dataclass(frozen=True, eq=False)
class Drawn:
    """What the nets made of an entry's images, in the order of their numbers, and the first images themselves.

    classes: the number of each attribute's likeliest value; without a net that reads attributes there are none."""

    features: Float[Tensor, "b d"]
    embeddings: Float[Tensor, "b e"] | None
    classes: Int64[Tensor, "b n"]
    first: UInt8[Tensor, "c 3 h w"]
    seconds_per_image: float
    images_per_second: float


@final
@dataclass(frozen=True, eq=False)
class TeacherReading:
    """The teacher's images at the most measured steps, from the noise that every row starts from, and what was read on them."""

    steps: int
    classes: Int64[Tensor, "b n"]
    first: UInt8[Tensor, "c 3 h w"]


def draw(entry: Entry, measure: Measure) -> Drawn:
    """Draw an entry's images and reduce them to features, each rank whole batches of them. Collective."""
    logger.info("drawing %d images: %s, %d steps", measure.images, entry.model, entry.steps)
    predict, device = predictor(entry), ranks.device()
    warm_up(entry)
    compared = min(measure.images, COMPARED_IMAGES)
    features, embeddings, classes, first = [], [], [], []
    seconds, count = 0.0, 0
    batches = list(batches_of_rank(measure.images, measure.batch_size))
    told = Told(entry.steps * len(batches))
    for batch in batches:
        started = time.perf_counter()
        drawn = draw_share(
            predict,
            entry.source,
            steps=entry.steps,
            seed=measure.seed,
            indices=batch,
            sampler=entry.sampler,
            batch_size=measure.batch_size,
            device=device,
            on_step=told,
        )
        seconds += time.perf_counter() - started
        count += len(batch)
        images = drawn.permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        features.append(measure.net.features(images))
        if measure.clip:
            same = measure.clip[0].name == measure.net.name
            embeddings.append(features[-1] if same else measure.clip[0].features(images))
        if measure.attributes:
            read = features[-1] if measure.attributes is measure.net else measure.attributes.features(images)
            classes.append(measure.attributes.classify(read))
        first.append(images[: max(0, compared - batch.start)].contiguous())
    slowest = ranks.all_gather_tensor(torch.tensor(seconds, dtype=torch.float64)).max()
    return Drawn(
        features=_gathered(features, torch.float32),
        embeddings=_gathered(embeddings, torch.float32) if measure.clip else None,
        classes=_gathered(classes, torch.int64) if measure.attributes else torch.empty((measure.images, 0), dtype=torch.int64),
        first=_gathered(first, torch.uint8),
        seconds_per_image=rank_seconds_per_image(seconds, count),
        images_per_second=measure.images / float(slowest),
    )


def teacher_reading(entry: Entry, measure: Measure, drawn: Drawn | None) -> TeacherReading:
    """What the rows are compared with: of `drawn`, from the cache where a stopped evaluation left it, or drawn for it. Collective."""
    reader = measure.attributes.identity if measure.attributes else "no attributes"
    identity = f"teacher 2\n{entry.source.weights_sha256}\n{entry.steps} {entry.sampler}\n{measure.images} of {measure.seed}\n{reader}"

    def make() -> dict[str, Tensor]:
        now = drawn or draw(entry, measure)
        return {"classes": now.classes, "first": now.first}

    arrays = cached(measure.cache, "teacher", identity, ("classes", "first"), make)
    return TeacherReading(entry.steps, arrays["classes"], arrays["first"])


def measured_row(entry: Entry, measure: Measure, drawn: Drawn, teacher: TeacherReading | None) -> EvaluationRow:
    """All numbers of an entry. Collective."""
    reference, device = measure.reference, ranks.device()
    features, against = drawn.features.to(device), reference.features.to(device)
    subsets = subset_distances(features, against, seed=measure.seed, divide=on_ranks)
    precision, recall = _manifold_shares(features, against, reference)
    row = replace(
        _bare_row(entry, measure, drawn.seconds_per_image, images=measure.images, seed=measure.seed),
        frechet_distance=frechet_distance(*mean_and_covariance(drawn.features), reference.mean, reference.covariance),
        kid=kernel_distance(features, against, divide=on_ranks),
        kid_mean=float(subsets.mean()),
        kid_spread=float(subsets.std(correction=0)),
        kid_subsets=SUBSETS,
        kid_subset_images=subset_images(len(features), len(against)),
        manifold_precision=precision,
        manifold_recall=recall,
        batch_images=measure.batch_size,
        images_per_second=drawn.images_per_second,
    )
    if measure.clip and drawn.embeddings is not None:
        net, embeddings = measure.clip
        row = replace(row, cmmd=cmmd(drawn.embeddings.to(device), embeddings.to(device), divide=on_ranks), cmmd_net=net.name)
    if teacher:
        feature_distance, rmse = distances(measure.net, drawn.first, teacher.first, divide=on_ranks)
        accuracy = float((drawn.classes == teacher.classes).double().mean()) if measure.attributes else None
        row = replace(
            row,
            attribute_accuracy=accuracy,
            attribute_teacher_steps=teacher.steps,
            teacher_feature_distance=feature_distance,
            teacher_pixel_rmse=rmse,
            teacher_images=len(drawn.first),
        )
    return _with_neighbours(row, measure, drawn)


def timed_row(entry: Entry, measure: Measure, seconds_per_image: float) -> EvaluationRow:
    """The row of an entry of too many steps to draw hundreds of images. Collective."""
    return _bare_row(entry, measure, seconds_per_image, images=PICTURES, seed=PICTURES_SEED)


def _bare_row(entry: Entry, measure: Measure, seconds_per_image: float, *, images: int, seed: int) -> EvaluationRow:
    """What is known of an entry without its images, and how fast it draws. Collective."""
    device = ranks.device()
    return EvaluationRow(
        model=entry.model,
        steps=entry.steps,
        sampler=entry.sampler,
        precision=entry.source.recipe.engine.precision,
        frechet_distance=None,
        kid=None,
        seconds_per_image=seconds_per_image,
        feature_net=measure.net.name,
        reference=measure.reference.name,
        images=images,
        seed=seed,
        attribute_accuracy=None,
        attribute_teacher_steps=None,
        feature_net_accuracy=measure.attributes.trained.mean_accuracy if measure.attributes else None,
        weights_sha256=entry.source.weights_sha256,
        made_for_steps=entry.source.descriptor.step_count,
        resize=measure.net.resize,
        attribute_net=measure.attributes.name if measure.attributes else None,
        ranks=ranks.world_size(),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        timings=time_batches(entry, measure.time_batches, seed=seed),
    )


def _manifold_shares(
    features: Float[Tensor, "b d"], against: Float[Tensor, "r d"], reference: Reference
) -> tuple[float | None, float | None]:
    """Precision and recall; None where a set is too small for a manifold."""
    if reference.radii is None or len(features) <= NEIGHBOURS:
        return None, None
    radii = squared_radii(features, divide=on_ranks)
    precision = share_within(features, against, reference.radii.to(features.device), divide=on_ranks)
    return precision, share_within(against, features, radii, divide=on_ranks)


def _with_neighbours(row: EvaluationRow, measure: Measure, drawn: Drawn) -> EvaluationRow:
    """The row with what was found of the training images, whose sheet rank 0 writes beside the evaluation."""
    if measure.training is None:
        return row
    neighbours = find_neighbours(drawn.features.to(ranks.device()), measure.training, divide=on_ranks)
    sheet = Path(f"{measure.out.stem}_neighbours") / f"{row.model}_{row.steps:04d}_steps.png"
    if ranks.is_rank_0():
        path = measure.out.parent / sheet
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, png(neighbours_sheet(drawn.first, neighbours, measure.training)))
    return replace(
        row,
        training=measure.training.name,
        training_distance=neighbours.median_distance,
        training_distance_of_reference=measure.training.reference_distance,
        neighbours_sheet=sheet.as_posix(),
    )


def _gathered(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """All ranks' parts in the order of the images' numbers. Collective."""
    return gather_rows(torch.cat(parts) if parts else torch.empty((0, 0), dtype=dtype))
