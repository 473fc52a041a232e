"""Everything that directories hold for the report, read once; what cannot be read becomes a notice, so that the rest is still shown."""

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from trainer.chain import read_chain
from trainer.config_io import load_recipe
from trainer.pictures import PictureRow
from trainer.report.about import credits_of, facts_of, kind_of, settings_of, stage_title
from trainer.report.cost import evaluations_per_update
from trainer.report.evaluated import read_measured
from trainer.report.html import steps_text
from trainer.report.subject import Measured, Sheet, Stage, Subject
from trainer.source import is_latent

_PROGRESS_PICTURES = 6
_PROGRESS_PIXELS, _SHEET_PIXELS = 300, 1200
_COLUMNS = ("step", "loss", "images_per_second", "step_seconds", "data_wait_seconds")


def gather(directory: Path, *, name: str, pictures: tuple[PictureRow, ...] = ()) -> Subject:
    """All that the page shows of one directory. Raises: ValueError for a recipe or chain.json that cannot be read."""
    runs = runs_of(directory)
    recipe = directory / "recipe.yaml"
    measured, notice = read_measured(directory / "evaluation.json")
    latent = is_latent(directory)
    sheets = _sheets(read_chain(directory)[0].run_dir if (directory / "chain.json").exists() else directory)
    return Subject(
        name=name,
        kind=kind_of(directory),
        facts=facts_of(directory),
        stages=tuple(read_stage(run_dir, title=title) for title, run_dir in runs if (run_dir / "recipe.yaml").exists()),
        pictures=pictures,
        measured=measured,
        progress=tuple(_sheet(path, _PROGRESS_PIXELS) for path in _spread(sheets)),
        latest=_sheet(sheets[-1], _SHEET_PIXELS) if latent and sheets else None,
        neighbours=_neighbours(directory, measured),
        settings=settings_of(directory) if recipe.exists() else {},
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        credits=credits_of(directory),
        notices=(notice,) if notice else (),
        is_latent=latent,
    )


def gather_or_say(directory: Path, *, name: str, pictures: tuple[PictureRow, ...] = ()) -> Subject:
    """gather, but a directory that cannot be read becomes a notice among the others."""
    try:
        return gather(directory, name=name, pictures=pictures)
    except ValueError as error:
        return Subject(name=name, kind="Cannot be shown.", facts=(("Directory", str(directory)),), notices=(str(error),))


def names_of(directories: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    resolved = [directory.resolve() for directory in directories]
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def runs_of(directory: Path) -> list[tuple[str, Path]]:
    """Titles and folders of the runs in a directory, the teacher's first where the chain has trained it; an export is one by itself."""
    if not (directory / "chain.json").exists():
        return [("", directory)]
    first, *others = read_chain(directory)
    teacher = [("Teacher", first.run_dir)] if first.trained_here else []
    return [*teacher, *((f"Student of {steps_text(stage.steps)}", stage.run_dir) for stage in others)]


def read_stage(run_dir: Path, *, title: str = "") -> Stage:
    """A run's metrics: whole lines alone, without what a writer that was killed left. title: empty for what the recipe says."""
    columns: dict[str, list[float]] = {key: [] for key in _COLUMNS}
    metrics = run_dir / "metrics.jsonl"
    for line in metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else ():
        if not line.endswith(b"\n"):
            break
        entry = _object(line)
        if isinstance(entry.get("step"), int):
            for key, values in columns.items():
                values.append(_number(entry.get(key)))
    recipe = load_recipe(run_dir / "recipe.yaml", ())
    return Stage(
        name=run_dir.name,
        title=title or stage_title(recipe),
        updates=recipe.train.steps,
        steps=tuple(int(step) for step in columns["step"]),
        losses=tuple(columns["loss"]),
        images_per_second=tuple(columns["images_per_second"]),
        step_seconds=tuple(columns["step_seconds"]),
        data_wait_seconds=tuple(columns["data_wait_seconds"]),
        evaluations_per_update=evaluations_per_update(recipe),
    )


def _object(line: bytes) -> dict[str, object]:
    """A line's object; empty for one that is damaged."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) else {}


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _sheets(run_dir: Path) -> list[Path]:
    """The grids drawn during training, first to last."""
    return sorted(path for path in (run_dir / "samples").glob("step_*.png") if path.stem.removeprefix("step_").isdigit())


def _spread(found: Sequence[Path]) -> list[Path]:
    """Up to six of them, the first and the last among them."""
    count = min(len(found), _PROGRESS_PICTURES)
    return [found[round(number * (len(found) - 1) / max(1, count - 1))] for number in range(count)]


def _neighbours(directory: Path, rows: Sequence[Measured]) -> tuple[Sheet, ...]:
    """Of each model the sheet of the fewest steps that an evaluation wrote into this directory."""
    sheets = {}
    for row in sorted(rows, key=lambda row: -row.steps):
        path = directory / str(row.notes.get("neighbours_sheet") or "none")
        if path.is_file() and path.resolve().is_relative_to(directory.resolve()):
            sheets[row.model] = _sheet(path, _SHEET_PIXELS, caption=f"{row.model}, {steps_text(row.steps)}")
    return tuple(sheets.values())


def _sheet(path: Path, pixels: int, *, caption: str | None = None) -> Sheet:
    """A picture of at most so many pixels a side. caption: None for the step in a grid's name."""
    with Image.open(path, formats=("PNG",)) as picture:
        small = picture.convert("RGB")
        small.thumbnail((pixels, pixels), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return Sheet(caption or f"after {int(path.stem.removeprefix('step_')):,} steps", buffer.getvalue())
