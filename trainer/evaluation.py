"""evaluation.json: one object a row, and the rule that distances measured differently are never compared."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import final

from data_shards.files import json_text, replace_file


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
@dataclass(frozen=True, kw_only=True)
class EvaluationRow:
    """What was measured of one model run in so many steps."""

    model: str
    """student or teacher."""
    steps: int
    """Network calls an image."""
    sampler: str
    """ddim or ancestral."""
    precision: str
    """Of activations while drawing, fp32 or bf16: what the model was trained in (engine.precision of its recipe)."""
    frechet_distance: float | None
    """To the reference, in the feature net's units (unit variance a feature); None above 32 steps."""
    kid: float | None
    """Kernel distance to the reference, unbiased; None above 32 steps."""
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
    feature_net_accuracy: float
    """Share of attributes that the net names rightly on reference images held out of its training."""
    weights_sha256: str
    """Of the evaluated model."""

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
    float | None: (float, int, type(None)),
    int | None: (int, type(None)),
}


def _row(path: Path, number: int, entry: object) -> EvaluationRow:
    known = fields(EvaluationRow)
    if not isinstance(entry, dict) or entry.keys() != {field.name for field in known}:
        raise ValueError(f"{path}: row {number} has not the fields of this halfstep's evaluations; delete the file and evaluate again")
    for field in known:
        if not isinstance(entry[field.name], _TYPES[field.type]):
            raise ValueError(f"{path}: row {number}: {field.name} is {entry[field.name]!r}; delete the file and evaluate again")
    return EvaluationRow(**entry)
