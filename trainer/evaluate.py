"""Quality and seconds an image of every model of a chain, against reference images that were not trained on."""

import hashlib
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from data_shards import ranks
from data_shards.index import ShardIndex
from trainer.evaluation import EvaluationRow, Yardstick, read_rows, write_rows
from trainer.feature_net import FEATURES, UPDATES, classify, features_of
from trainer.frechet import frechet_distance, kernel_distance, mean_and_covariance
from trainer.options import Options, integer, optional_text
from trainer.pictures import PICTURES, PICTURES_SEED, Entry, load_models, picture_row, predictor, rank_seconds_per_image, warm_up
from trainer.reference import NamedFeatureNet, NetTraining, Reference, prepare_measure, read_arrays, write_arrays
from trainer.sample import DEFAULT_BATCH_SIZE, draw_share
from trainer.stock import is_stock

logger = logging.getLogger(__name__)

DEFAULT_IMAGES = 512
MOST_MEASURED_STEPS = 32
"""Above it distances are not measured: hundreds of images of hundreds of network calls each; pictures and seconds are."""


@final
@dataclass(frozen=True, eq=False)
class Measure:
    """What every row is measured with."""

    net: NamedFeatureNet
    reference: Reference
    images: int
    seed: int
    batch_size: int
    cache: Path

    @property
    def yardstick(self) -> Yardstick:
        """What rows of this measure carry."""
        return Yardstick(self.net.name, self.reference.name.rpartition("@")[2], self.images, self.seed)


@final
@dataclass(frozen=True, eq=False)
class Drawn:
    """What the net made of an entry's images: their features, and the number of each attribute's likeliest value."""

    seconds_per_image: float
    features: Float[Tensor, "b d"]
    classes: Int64[Tensor, "b n"]


@final
@dataclass(frozen=True, eq=False)
class TeacherReading:
    """The attributes read on the teacher's images at the most measured steps, from the noise that every row starts from."""

    steps: int
    classes: Int64[Tensor, "b n"]


def evaluate_job(path: Path, options: Options) -> int:
    """Evaluate the models at `path`, one row a model and step count; each row is written to `out` as soon as it is done.

    options: reference (shards; required), steps (list; default: the counts that the models were made for), images, seed,
    batch_size, out (default: PATH/evaluation.json), cache (default: evaluation_cache beside `out`), feature_net_updates.
    Rows that are there already, of the same weights and measured alike, are kept. Returns the exit code.
    Raises: ValueError if source, reference and options do not fit, or `out` holds rows measured otherwise. Collective."""
    reference = optional_text(options, "reference")
    if reference is None:
        raise ValueError("evaluate needs images to compare with; give --reference SHARDS")
    out = Path(optional_text(options, "out") or path / "evaluation.json")
    cache = Path(optional_text(options, "cache") or out.parent / "evaluation_cache")
    images, batch_size = integer(options, "images", DEFAULT_IMAGES), integer(options, "batch_size", DEFAULT_BATCH_SIZE)
    if images < 2 or batch_size < 1:
        raise ValueError(f"--images {images} --batch-size {batch_size}: a distance needs at least 2 images, a batch at least 1")
    index, models = ShardIndex.load(reference), load_models(path)
    if models.image_size != index.image_size:
        raise ValueError(
            f"{path} draws images of {models.image_size} px, {reference} holds such of {index.image_size} px; "
            f"pack a reference with --size {models.image_size}"
        )
    todo = models.entries(_step_list(options) or models.step_counts())
    training = NetTraining(updates=integer(options, "feature_net_updates", UPDATES))
    net, statistics = prepare_measure(index, cache, training=training)
    out.parent.mkdir(parents=True, exist_ok=True)
    # nothing is written into others' folders, nor where a Hub id would be one
    pictures = path if path.is_dir() and not is_stock(path) else out.parent
    evaluate(todo, Measure(net, statistics, images, integer(options, "seed", 0), batch_size, cache), out=out, pictures=pictures)
    return 0


def evaluate(todo: Iterable[Entry], measure: Measure, *, out: Path, pictures: Path) -> None:
    """See evaluate_job; `todo` comes most steps first, at each count the teacher first.

    pictures: the folder that holds the rows of pictures whose drawing times what takes more than 32 steps. Collective."""
    rows = {(row.model, row.steps): row for row in read_rows(out)}
    for row in rows.values():
        if row.frechet_distance is not None:
            measure.yardstick.check_equal(row.yardstick, mine="this evaluation", others=f"{row.name} in {out}")
    ranks.barrier()  # every rank has read the rows before rank 0 writes one
    teacher: TeacherReading | None = None
    for entry in todo:
        known = rows.get((entry.model, entry.steps))
        current = known is not None and known.weights_sha256 == entry.source.weights_sha256
        if entry.steps > MOST_MEASURED_STEPS:
            row = known if current else _timed_row(entry, measure, picture_row(entry, pictures).seconds_per_image)
        elif entry.model == "teacher" and teacher is None:
            teacher, row = _teacher_reading(entry, measure, known if current else None)
        else:
            row = known if current else _measured_row(entry, measure, _draw(entry, measure), teacher)
        if row is not None and row is not known:
            rows = {**rows, (row.model, row.steps): row}
            if ranks.is_rank_0():
                write_rows(out, rows.values())
                logger.info("%s", _in_words(row))
    ranks.barrier()


def _draw(entry: Entry, measure: Measure) -> Drawn:
    """Draw an entry's images and reduce them to features, each rank its share. Collective."""
    logger.info("drawing %d images: %s, %d steps", measure.images, entry.model, entry.steps)
    share, device, net = ranks.share(measure.images), ranks.device(), measure.net.trained.net
    predict = predictor(entry)
    warm_up(entry)
    started = time.perf_counter()
    drawn = draw_share(
        predict,
        entry.source,
        steps=entry.steps,
        seed=measure.seed,
        indices=share,
        sampler=entry.sampler,
        batch_size=measure.batch_size,
        device=device,
    )
    seconds = rank_seconds_per_image(time.perf_counter() - started, len(share))
    # Shares differ by one image at most: rows of NaN fill the shorter ones up for the gather and are dropped after it.
    padded = torch.full((-(-measure.images // ranks.world_size()), FEATURES), torch.nan)
    if share:
        padded[: len(share)] = features_of(net, drawn.permute(0, 3, 1, 2))
    gathered = ranks.all_gather_tensor(padded.to(device)).cpu().flatten(0, 1)
    features = gathered[~gathered.isnan().all(dim=1)]
    return Drawn(seconds, features, classify(net, features))


def _teacher_reading(entry: Entry, measure: Measure, known: EvaluationRow | None) -> tuple[TeacherReading, EvaluationRow]:
    """The teacher's own row, and its reading for the rows after it: from the cache where a stopped evaluation left it. Collective."""
    identity = f"{entry.source.weights_sha256}\n{measure.yardstick}\n{entry.steps}"
    path = measure.cache / f"teacher_{hashlib.sha256(identity.encode()).hexdigest()[:16]}.npz"
    if known is not None and not ranks.any_rank(not path.exists()):
        return TeacherReading(entry.steps, torch.from_numpy(read_arrays(path, ("classes",))["classes"])), known
    drawn = _draw(entry, measure)
    if ranks.is_rank_0():
        write_arrays(path, {"classes": drawn.classes.numpy()})
    return TeacherReading(entry.steps, drawn.classes), known or _measured_row(entry, measure, drawn, None)


def _measured_row(entry: Entry, measure: Measure, drawn: Drawn, teacher: TeacherReading | None) -> EvaluationRow:
    reference = measure.reference
    return EvaluationRow(
        model=entry.model,
        steps=entry.steps,
        sampler=entry.sampler,
        precision=entry.source.recipe.engine.precision,
        frechet_distance=frechet_distance(*mean_and_covariance(drawn.features), reference.mean, reference.covariance),
        kid=kernel_distance(drawn.features, reference.features),
        seconds_per_image=drawn.seconds_per_image,
        feature_net=measure.net.name,
        reference=reference.name,
        images=measure.images,
        seed=measure.seed,
        attribute_accuracy=float((drawn.classes == teacher.classes).double().mean()) if teacher else None,
        attribute_teacher_steps=teacher.steps if teacher else None,
        feature_net_accuracy=measure.net.trained.mean_accuracy,
        weights_sha256=entry.source.weights_sha256,
    )


def _timed_row(entry: Entry, measure: Measure, seconds_per_image: float) -> EvaluationRow:
    """The row of an entry of too many steps to draw hundreds of images."""
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
        images=PICTURES,
        seed=PICTURES_SEED,
        attribute_accuracy=None,
        attribute_teacher_steps=None,
        feature_net_accuracy=measure.net.trained.mean_accuracy,
        weights_sha256=entry.source.weights_sha256,
    )


def _in_words(row: EvaluationRow) -> str:
    """A row as one line for the log."""
    distance = "" if row.frechet_distance is None else f"Frechet distance {row.frechet_distance:.3f}, KID {row.kid:.5f}, "
    return f"{row.name}: {distance}{row.seconds_per_image:.4f} seconds an image"


def _step_list(options: Options) -> tuple[int, ...]:
    """The steps option, a list of integers; empty where it is absent or null."""
    value = options.get("steps") or []
    assert isinstance(value, list) and all(type(count) is int for count in value), f"option steps is {value!r}, wanted integers"
    return tuple(value)
