"""evaluation.json as the report reads it: rows of any halfstep, and each number with what it was measured with."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from trainer.report.measures import MODELS, QUALITY, SPEED
from trainer.report.subject import Measured

_YARDSTICK = ("feature_net", "resize", "reference", "images", "seed")
_OTHER_NAMES = {"previous_student": "previous"}

ByCount = dict[int, Measured]
"""One model's rows by step count."""


def read_measured(path: Path) -> tuple[tuple[Measured, ...], str]:
    """The rows of an evaluation.json and a notice: why there are none, empty where the file is whole or absent."""
    if not path.exists():
        return (), ""
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        return (), f"{path}: not valid JSON ({error}); evaluate again"
    rows = [_row(entry) for entry in content] if isinstance(content, list) else [None]
    if None in rows:
        return tuple(row for row in rows if row), f"{path}: not all of it are rows of an evaluation; delete it and evaluate again"
    return tuple(row for row in rows if row), ""


def by_model(rows: Iterable[Measured]) -> dict[str, ByCount]:
    """The rows of each model by step count, the known models first."""
    found: dict[str, ByCount] = {}
    for row in rows:
        found.setdefault(row.model, {})[row.steps] = row
    return {model: found[model] for model in [*MODELS, *sorted(found.keys() - MODELS.keys())] if model in found}


def has_quality(row: Measured) -> bool:
    """Whether anything but time was measured."""
    return any(measure.key in row.values for measure in QUALITY)


def measured_alike(rows: Iterable[Measured]) -> list[list[Measured]]:
    """The rows with a quality, apart by what they were measured with, the largest group first."""
    groups: dict[tuple[tuple[str, str], ...], list[Measured]] = {}
    for row in rows:
        if has_quality(row):
            groups.setdefault(row.yardstick, []).append(row)
    return sorted(groups.values(), key=len, reverse=True)


def own_rows(rows: Sequence[Measured]) -> list[Measured]:
    """Of a directory its students' rows, of a lone teacher the teacher's: what it stands for in a comparison."""
    return [row for row in rows if row.model == "student"] or [row for row in rows if row.model == "teacher"]


def differences(rows: Sequence[Measured]) -> str:
    """In what the yardsticks of rows differ, in words."""
    names = dict.fromkeys(name for row in rows for name, _ in row.yardstick)
    values = {name: list(dict.fromkeys(dict(row.yardstick).get(name, "?") for row in rows)) for name in names}
    return "; ".join(f"{name.replace('_', ' ')}: {', '.join(found)}" for name, found in values.items() if len(found) > 1)


def _row(entry: object) -> Measured | None:
    if not isinstance(entry, dict):
        return None
    model, steps = entry.get("model"), entry.get("steps")
    if not isinstance(model, str) or not isinstance(steps, int) or steps < 1:
        return None
    values = {measure.key: value for measure in (*QUALITY, *SPEED) if (value := _number(entry.get(measure.key))) is not None}
    yardstick = tuple((name, _yardstick(name, entry)) for name in _YARDSTICK if name in entry)
    return Measured(_OTHER_NAMES.get(model, model), steps, values, yardstick, entry)


def _yardstick(name: str, entry: Mapping[str, object]) -> str:
    """Of the reference its index's hash: whatever the folder is called."""
    value = str(entry[name])
    return value.rpartition("@")[2] if name == "reference" else value


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) else None
