"""`halfstep report`: gather what directories hold, draw what is missing, write one self-contained page and the picture beside it."""

import logging
from pathlib import Path

from data_shards import ranks
from data_shards.files import replace_file
from trainer.chain import read_chain
from trainer.options import Options, flag, integer, optional_text
from trainer.pictures import (
    MOST_MEASURED_STEPS,
    Models,
    PictureRow,
    has_model,
    kept_picture_row,
    load_models,
    overview_picture,
    picture_row,
)
from trainer.report.gather import gather, gather_or_say, names_of
from trainer.report.page import page
from trainer.sample import png
from trainer.source import is_latent

logger = logging.getLogger(__name__)

DEFAULT_STEPS = 50
"""The most that pictures of several directories are drawn in: they show what a thousand steps do, in a twentieth of the time."""


def report_job(path: Path, options: Options) -> int:
    """Write the page about `path`, or about all of `dirs`; a chain's grid also as grid.png beside the page.

    options: dirs (list; default: PATH alone), out (default: PATH/report.html), title, draw (default true: pictures that are not
    there yet are drawn by all ranks, of a chain a teacher's row of 1,000 network calls too), steps (of several directories: the most
    steps that pictures are drawn in). Of several directories one that cannot be read is a notice on the page. Returns the exit code.
    Raises: ValueError if a directory is neither a run, a chain nor an export. Collective."""
    directories = _directories(path, options)
    out = Path(optional_text(options, "out") or path / "report.html")
    for directory in directories:
        if not any((directory / name).exists() for name in ("chain.json", "recipe.yaml")):
            raise ValueError(f"{directory}: neither a RUN_DIR, a chain's directory nor an export; give one that halfstep wrote")
    alone = len(directories) == 1
    single_steps = None if alone else integer(options, "steps", DEFAULT_STEPS)
    draws = options.get("draw") is None or flag(options, "draw")
    pictures = [draw_pictures(directory, single_steps=single_steps, draws=draws) for directory in directories]
    if ranks.is_rank_0():
        names = names_of(directories)
        read = gather if alone else gather_or_say
        subjects = [read(each, name=name, pictures=drawn) for each, name, drawn in zip(directories, names, pictures, strict=True)]
        out.parent.mkdir(parents=True, exist_ok=True)
        first_grid = next((drawn for drawn in pictures if len(drawn) > 1), None)
        if first_grid:
            replace_file(out.with_name("grid.png"), png(overview_picture(first_grid)))
        replace_file(out, page(subjects, title=optional_text(options, "title")))
        logger.info("%s: %s", out, ", ".join(names))
    ranks.barrier()
    return 0


def draw_pictures(directory: Path, *, single_steps: int | None, draws: bool = True) -> tuple[PictureRow, ...]:
    """Same-noise pictures: of a chain at each count that a model was made for the student and, if it is not too large, the teacher.

    single_steps: None for a directory that is alone; else pictures of more steps than this are not drawn, only shown where they
    are there already; a teacher and a single run, which are no students, are drawn in so many. draws: False draws none.
    Of several directories one that cannot be read has none. Collective."""
    try:
        models = _models(directory, single=single_steps is not None)
    except ValueError as error:
        if single_steps is None:
            raise
        logger.warning("no pictures of %s: %s", directory, error)
        return ()
    if models is None:
        return ()
    counts = set(models.step_counts())
    if single_steps is not None and models.teacher:
        counts.add(min(single_steps, max(counts)))
    rows = []
    for entry in models.entries(counts):
        costs = entry.is_cut and entry.steps > MOST_MEASURED_STEPS if single_steps is None else entry.steps > single_steps
        row = picture_row(entry, directory) if draws and not costs else kept_picture_row(entry, directory)
        rows += [] if row is None else [row]
    return tuple(rows)


def _models(directory: Path, *, single: bool) -> Models | None:
    """What draws: a chain whose teacher has a checkpoint; with `single` a run or export of pixels, too."""
    if (directory / "chain.json").exists():
        return load_models(directory) if has_model(read_chain(directory)[0].run_dir) else None
    return load_models(directory) if single and not is_latent(directory) and has_model(directory) else None


def _directories(path: Path, options: Options) -> list[Path]:
    value = options.get("dirs") or [str(path)]
    assert isinstance(value, list) and all(isinstance(each, str) for each in value), f"option dirs is {value!r}, wanted a list of paths"
    return list(dict.fromkeys(Path(each) for each in value))
