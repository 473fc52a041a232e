"""evaluation.json: one object a row, and the rule that distances measured differently are never compared."""

import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import final

from data_shards.files import json_text, replace_file

SCHEMA_VERSION = 2
"""Of a row. Version 1 had neither it nor any of the fields that have a default below."""


@final
@dataclass(frozen=True)
class Yardstick:
    """What two rows must share for their distances to be compared."""

    feature_net: str
    reference: str
    """The index's hash, whatever the folder is called."""
    images: int
    seed: int

    def check_equal(self, other: "Yardstick", *, mine: str, others: str) -> None:
        """Raises: ValueError saying in what the yardsticks of rows `mine` and `others` differ."""
        for field in fields(self):
            here, there = getattr(self, field.name), getattr(other, field.name)
            if here != there:
                raise ValueError(
                    f"{mine} has {field.name.replace('_', ' ')} {here}, {others} has {there}; numbers measured differently "
                    "cannot be compared: evaluate both with one feature net, reference, --images and --seed, or use another --out"
                )


@final
@dataclass(frozen=True)
class BatchTiming:
    """How fast a model draws batches of one size; processes draw at the same time, each its own."""

    batch_images: int
    """Images that one process draws at once."""
    seconds_per_image: float
    """Wall seconds of a process for a batch, over its images; the median batch, the mean of all processes."""
    images_per_second: float
    """Of all processes together."""


@final
@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """What was measured of one model run in so many steps; None where it was not measured."""

    model: str
    """student, teacher, or previous: the student of the stage before, run in the steps of the next one."""
    steps: int
    """Network calls an image."""
    sampler: str
    """ddim or ancestral."""
    precision: str
    """Of activations while drawing, fp32 or bf16: what the model was trained in (engine.precision of its recipe)."""
    frechet_distance: float | None
    """To the reference, in squared units of the feature net's features; None above the steps that distances are measured up to."""
    kid: float | None
    """Kernel distance to the reference, unbiased, over all pairs of images; None above those steps."""
    seconds_per_image: float
    """Wall seconds that one process takes for one image: all processes' seconds over all images."""
    feature_net: str
    """Which feature net measured the distances."""
    reference: str
    """Which images they are distances to: folder@sha256:index hash."""
    images: int
    """Images drawn for this row."""
    seed: int
    """Image i is drawn from seed + i."""
    attribute_accuracy: float | None
    """Share of attributes that read the same as on the teacher's image from the same noise; None where there is none."""
    attribute_teacher_steps: int | None
    """In how many steps that teacher image was drawn."""
    feature_net_accuracy: float | None
    """Share of attributes that attribute_net names rightly on images held out of its training; None where there is no such net."""
    weights_sha256: str
    """Of the evaluated model."""
    schema_version: int = SCHEMA_VERSION
    made_for_steps: int | None = None
    """Sampling steps that the model was made for: of a student its own count, of a teacher all its levels."""
    resize: str | None = None
    """How images are brought to the feature net's size: method-pixels; part of the feature net's name where it can be chosen."""
    attribute_net: str | None = None
    """Which net reads the attributes; None where the reference has none and another net measures the distances."""
    kid_mean: float | None = None
    """Mean of the unbiased kernel distances of random subsets (Binkowski et al. 2018); from `kid` only by chance."""
    kid_spread: float | None = None
    """Standard deviation over these subsets."""
    kid_subsets: int | None = None
    kid_subset_images: int | None = None
    """Images of a subset: 1000, or half of the smaller set where that is below 1000."""
    cmmd: float | None = None
    """CLIP maximum mean discrepancy, times 1000 (Jayasumana et al. 2024)."""
    cmmd_net: str | None = None
    """The CLIP net whose embeddings it compares."""
    manifold_precision: float | None = None
    """Share of drawn images within the reference's manifold, its 3 nearest neighbours wide (Kynkaanniemi et al. 2019)."""
    manifold_recall: float | None = None
    """Share of reference images within the drawn images' manifold."""
    teacher_feature_distance: float | None = None
    """To the teacher's images of the same noise: unit-normalised features of the net's layers (LPIPS without its weights)."""
    teacher_pixel_rmse: float | None = None
    """Root mean square difference to those images, as a share of the range of pixel values."""
    teacher_images: int | None = None
    """How many images these two compare; the teacher drew them in attribute_teacher_steps."""
    batch_images: int | None = None
    """Images that a process draws at once for seconds_per_image and images_per_second."""
    images_per_second: float | None = None
    """Of all processes together: images over the wall seconds of the slowest process."""
    ranks: int | None = None
    """Processes that drew."""
    device: str | None = None
    """What they drew on: cpu, or the GPU's name."""
    timings: tuple[BatchTiming, ...] = ()
    """Speed by batch size, where it was asked for."""
    training: str | None = None
    """Which images the nearest ones were looked for in: folder@sha256:index hash."""
    training_distance: float | None = None
    """Median distance of a drawn image to its nearest training image, in features of the net."""
    training_distance_of_reference: float | None = None
    """The same of reference images, which were not trained on: far below it, a model draws what it was trained on."""
    neighbours_sheet: str | None = None
    """PNG of drawn images beside their nearest training images, relative to evaluation.json."""

    @property
    def yardstick(self) -> "Yardstick":
        """What this row's distances were measured with."""
        return Yardstick(self.feature_net, self.reference.rpartition("@")[2], self.images, self.seed)

    @property
    def name(self) -> str:
        """The row in words, for messages and tables."""
        return f"{self.model} at {self.steps} {'step' if self.steps == 1 else 'steps'}"


def read_rows(path: Path) -> tuple[EvaluationRow, ...]:
    """The rows of an evaluation.json; none where there is no file.

    Raises: ValueError naming the file if it is not a list of rows."""
    if not path.exists():
        return ()
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and evaluate again") from error
    if not isinstance(content, list):
        raise ValueError(f"{path}: holds {type(content).__name__}, wanted a list of rows; delete it and evaluate again")
    return tuple(_row(path, number, entry) for number, entry in enumerate(content))


def write_rows(path: Path, rows: Iterable[EvaluationRow]) -> None:
    """Write the rows, most steps first, each student before its teacher; the file is whole at every moment."""
    ordered = sorted(rows, key=lambda row: (-row.steps, row.model, row.sampler))
    replace_file(path, json_text([asdict(row) for row in ordered]))


def ratio(row: EvaluationRow, base: EvaluationRow) -> float | None:
    """How many times the base's Frechet distance a row's is; None where either was not measured.

    Raises: ValueError if the two were not measured alike."""
    if row.frechet_distance is None or not base.frechet_distance:
        return None
    row.yardstick.check_equal(base.yardstick, mine=row.name, others=base.name)
    return row.frechet_distance / base.frechet_distance


_TYPES: dict[object, tuple[type, ...]] = {
    str: (str,),
    int: (int,),
    float: (float, int),
    str | None: (str, type(None)),
    int | None: (int, type(None)),
    float | None: (float, int, type(None)),
    tuple[BatchTiming, ...]: (list,),
}


def _row(path: Path, number: int, entry: object) -> EvaluationRow:
    mend = "delete the file and evaluate again"
    if not isinstance(entry, dict):
        raise ValueError(f"{path}: row {number} is no object; {mend}")
    version = entry.get("schema_version", 1)
    known = {field.name: field for field in fields(EvaluationRow) if version != 1 or field.default is MISSING}
    if version not in (1, SCHEMA_VERSION) or entry.keys() != known.keys():
        raise ValueError(f"{path}: row {number} has not the fields of this halfstep's evaluations; {mend}")
    for name, field in known.items():
        if isinstance(entry[name], bool) or not isinstance(entry[name], _TYPES[field.type]):
            raise ValueError(f"{path}: row {number}: {name} is {entry[name]!r}; {mend}")
    timings = tuple(_timing(path, number, timing, mend) for timing in entry.get("timings", ()))
    return EvaluationRow(**{**entry, "schema_version": SCHEMA_VERSION, "timings": timings})


def _timing(path: Path, number: int, entry: object, mend: str) -> BatchTiming:
    match entry:
        case {"batch_images": int(images), "seconds_per_image": float(seconds), "images_per_second": float(speed), **others} if not others:
            return BatchTiming(images, seconds, speed)
        case _:
            raise ValueError(f"{path}: row {number}: timings hold {entry!r}; {mend}")
