"""Quality and seconds an image of every model of a chain, against reference images that were not trained on."""

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from data_shards import ranks
from data_shards.files import read_json_object
from data_shards.index import ShardIndex
from trainer.config_data import DATA_SHA256, MIXTURE_SHA256
from trainer.evaluation import EvaluationRow, read_rows, write_rows
from trainer.feature_net import UPDATES
from trainer.options import Options, flag, integer, optional_text
from trainer.pictures import MOST_MEASURED_STEPS, Entry, Models, load_models, picture_row
from trainer.quality.faces_net import NetTraining, feature_net_on_ranks, has_attributes
from trainer.quality.measure import Measure, TeacherReading, draw, measured_row, teacher_reading, timed_row
from trainer.quality.memorisation import prepare_training
from trainer.quality.nets import FacesFeatures, ImageFeatures, InceptionFeatures, TransformerFeatures, default_resize, net_kind
from trainer.quality.resize import resize_method
from trainer.quality.rows import on_ranks
from trainer.quality.statistics import prepare_reference, shard_features
from trainer.sample import DEFAULT_BATCH_SIZE
from trainer.source import load_source
from trainer.stock import is_stock

logger = logging.getLogger(__name__)

DEFAULT_IMAGES = 512


def evaluate_job(path: Path, options: Options) -> int:
    """Evaluate the models at `path`, one row a model and step count; each row is written to `out` as soon as it is done.

    options: reference (shards; required), steps (list; default: the counts that the models were made for), images, seed, batch_size,
    out (default: PATH/evaluation.json), cache (default: evaluation_cache beside `out`), feature_net (see trainer.quality.nets.net_kind),
    resize, clip (a folder or Hub id, for CMMD), teacher (a source, where PATH has none), previous (rows of each student's own teacher
    too), measure_up_to (steps), time_batches (list), training (shards), feature_net_updates.
    Rows that are there already, of the same weights, measured alike and with all that is asked for, are kept. Returns the exit code.
    Raises: ValueError if source, reference and options do not fit, or `out` holds rows measured otherwise. Collective."""
    out = Path(optional_text(options, "out") or path / "evaluation.json")
    cache = Path(optional_text(options, "cache") or out.parent / "evaluation_cache")
    images, batch_size = integer(options, "images", DEFAULT_IMAGES), integer(options, "batch_size", DEFAULT_BATCH_SIZE)
    if images < 2 or batch_size < 1:
        raise ValueError(f"--images {images} --batch-size {batch_size}: a distance needs at least 2 images, a batch at least 1")
    models, index = _models(path, options), _reference_index(options)
    if models.image_size != index.image_size:
        raise ValueError(
            f"{path} draws images of {models.image_size} px, {index.root} holds such of {index.image_size} px; "
            f"pack a reference with --size {models.image_size}"
        )
    if flag(options, "previous") and not (path / "chain.json").exists():
        raise ValueError(f"--previous: {path} is no chain, whose students have teachers; leave --previous out")
    _warn_of_training_images(path, index)
    measured_up_to = integer(options, "measure_up_to", MOST_MEASURED_STEPS)
    asked = _integers(options, "steps")
    todo = models.entries(asked or models.step_counts())
    if not asked:
        todo = (entry for entry in todo if not (entry.is_cut and entry.steps > measured_up_to))
    training, side = optional_text(options, "training"), models.image_size
    training_index = ShardIndex.load(training) if training else None
    other, clip = _other_nets(options)
    attributes = _own_net(index, cache, options) if other is None or has_attributes(index) else None
    net = other or attributes
    assert net is not None, "without another net the project's own is there"
    reference = prepare_reference(index, net, cache, side=side)
    measure = Measure(
        net=net,
        reference=reference,
        attributes=attributes,
        clip=(clip, shard_features(index, clip, cache, side=side)) if clip else None,
        training=prepare_training(training_index, net, reference, cache, side=side, divide=on_ranks) if training_index else None,
        images=images,
        seed=integer(options, "seed", 0),
        batch_size=batch_size,
        measured_up_to=measured_up_to,
        time_batches=_integers(options, "time_batches"),
        cache=cache,
        out=out,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    # nothing is written into others' folders, nor where a Hub id would be one
    pictures = path if path.is_dir() and not is_stock(path) else out.parent
    evaluate(with_previous(todo, models.students) if flag(options, "previous") else todo, measure, pictures=pictures)
    return 0


def evaluate(todo: Iterable[Entry], measure: Measure, *, pictures: Path) -> None:
    """See evaluate_job; `todo` comes most steps first, at each count the teacher first.

    pictures: the folder that holds the rows of pictures whose drawing times what takes too many steps to be measured. Collective."""
    out = measure.out
    rows = {(row.model, row.steps): row for row in read_rows(out)}
    for row in rows.values():
        if row.frechet_distance is not None:
            measure.yardstick.check_equal(row.yardstick, mine="this evaluation", others=f"{row.name} in {out}")
    ranks.barrier()  # every rank has read the rows before rank 0 writes one
    teacher: TeacherReading | None = None
    for entry in todo:
        found = rows.get((entry.model, entry.steps))
        known = found if found is not None and measure.serves(found, entry) else None
        if entry.steps > measure.measured_up_to:
            row = known or timed_row(entry, measure, picture_row(entry, pictures).seconds_per_image)
        elif entry.model == "teacher" and teacher is None:
            drawn = None if known else draw(entry, measure)
            teacher = teacher_reading(entry, measure, drawn)
            row = known if drawn is None else measured_row(entry, measure, drawn, None)
        else:
            row = known or measured_row(entry, measure, draw(entry, measure), teacher)
        assert row is not None, "a row is known or made"
        if row is not known:
            rows = {**rows, (row.model, row.steps): row}
            if ranks.is_rank_0():
                write_rows(out, rows.values())
                logger.info("%s", _in_words(row))
    ranks.barrier()


def with_previous(todo: Iterable[Entry], students: Mapping[int, Path]) -> Iterator[Entry]:
    """After each student the one that it was made from, run in its steps; a first student's teacher has a row already.

    students: of each step count, where the student is."""
    for entry in todo:
        yield entry
        larger = [count for count in students if count > entry.steps]
        if entry.model == "student" and larger:
            before = load_source(students[min(larger)])
            yield Entry("previous", entry.steps, before.descriptor.sampler, before)


def _models(path: Path, options: Options) -> Models:
    """The models at `path`, with the teacher that the options name in the stead of their own."""
    models, teacher = load_models(path), optional_text(options, "teacher")
    if teacher is None:
        return models
    source = load_source(Path(teacher))
    if source.descriptor.image_size != models.image_size:
        raise ValueError(f"--teacher {teacher} draws images of {source.descriptor.image_size} px, {path} such of {models.image_size} px")
    return replace(models, teacher=source)


def _warn_of_training_images(path: Path, reference: ShardIndex) -> None:
    """Say so where the reference is what a run or chain was trained on."""
    identity = read_json_object(path / "identity.json") if (path / "identity.json").is_file() else {}
    trained_on = [value for name in (DATA_SHA256, MIXTURE_SHA256) for value in _as_list(identity.get(name))]
    if reference.sha256 in trained_on and ranks.is_rank_0():
        logger.warning("%s was trained on the images of --reference %s: being near to them is no merit", path, reference.root)


def _as_list(value: object) -> list[object]:
    """A list as it is, another value as a list of one."""
    return value if isinstance(value, list) else [value]


def _reference_index(options: Options) -> ShardIndex:
    reference = optional_text(options, "reference")
    if reference is None:
        raise ValueError("evaluate needs images to compare with; give --reference SHARDS")
    return ShardIndex.load(reference)


def _other_nets(options: Options) -> tuple[ImageFeatures | None, TransformerFeatures | None]:
    """The net that distances are measured with, None for the project's own, and CLIP for CMMD: that net, or the one asked for.

    Raises: ValueError if there is no such net, or its files are not what they should be."""
    kind, where = net_kind(optional_text(options, "feature_net") or "faces")
    chosen, clip = optional_text(options, "resize"), optional_text(options, "clip")
    method, device = resize_method(chosen) if chosen else default_resize(kind), ranks.device()
    asked = TransformerFeatures("clip", clip, default_resize("clip"), device) if clip else None
    match kind:
        case "faces":
            if chosen:
                raise ValueError(f"--resize {chosen}: the project's own feature net has a size and a method of its own; leave it out")
            return None, asked
        case "inception":
            return InceptionFeatures(Path(where), method, device), asked
        case "clip" | "dinov2":
            net = TransformerFeatures(kind, where, method, device)
            return net, asked or (net if kind == "clip" else None)


def _own_net(index: ShardIndex, cache: Path, options: Options) -> FacesFeatures:
    """The net that reads attributes, trained on the shards that --feature-net faces=SHARDS names, or on the reference. Collective."""
    kind, where = net_kind(optional_text(options, "feature_net") or "faces")
    learnt_from = ShardIndex.load(where) if kind == "faces" and where else index
    training = NetTraining(updates=integer(options, "feature_net_updates", UPDATES))
    return FacesFeatures(feature_net_on_ranks(learnt_from, cache, training=training), ranks.device())


def _in_words(row: EvaluationRow) -> str:
    """A row as one line for the log."""
    distance = "" if row.frechet_distance is None else f"Frechet distance {row.frechet_distance:.3f}, KID {row.kid:.5f}, "
    return f"{row.name}: {distance}{row.seconds_per_image:.4f} seconds an image"


def _integers(options: Options, name: str) -> tuple[int, ...]:
    """An option that is a list of integers; empty where it is absent or null."""
    value = options.get(name) or []
    assert isinstance(value, list) and all(type(count) is int for count in value), f"option {name} is {value!r}, wanted integers"
    return tuple(value)
