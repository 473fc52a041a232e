"""Grids of samples (the paper's figures 8, 10, 12 and 13): the same noise in every row, or a run's own sheets."""

from collections.abc import Mapping, Sequence
from html import escape

from trainer.pictures import PictureRow
from trainer.report.evaluated import by_model
from trainer.report.html import data_uri, duration, steps_text, strip
from trainer.report.measures import QUALITY
from trainer.report.subject import Measured, Sheet, Subject

_DISTANCE = QUALITY[0]


def chain_grid(pictures: Sequence[PictureRow], rows: Sequence[Measured]) -> str:
    """One chain's grid: a line a step count, the student made for it beside the teacher cut to it."""
    drawn = {(picture.model, picture.steps): picture for picture in pictures}
    counts = sorted({picture.steps for picture in pictures}, reverse=True)
    measured = by_model(rows)
    lines = []
    for count in counts:
        timed = drawn.get(("student", count), drawn.get(("teacher", count)))
        assert timed is not None, "a count is listed because something was drawn"
        lines.append(_count(count, timed.seconds_per_image))
        for model in ("student", "teacher"):
            picture, row = drawn.get((model, count)), measured.get(model, {}).get(count)
            label = f"{model}{_distance(row)}"
            who = f'<span class="who {model}">{label}</span>'
            if picture is None:
                missing = {"student": "not trained", "teacher": "not drawn"}[model]
                why = "This is the model that all students come from." if count == counts[0] and model == "student" else missing
                lines.append(f'<div class="none">{who}{why}</div>')
            else:
                lines.append(f"<div>{who}{strip(picture.images, f'{model}, {steps_text(count)}{_distance(row)}')}</div>")
    heads = (
        '<div class="head"></div><div class="head student">Student made for so many steps</div>'
        '<div class="head teacher">Teacher run in so many DDIM steps</div>'
    )
    return (
        '<h2>The same noise, ever fewer steps</h2><p class="soft">Every row starts from the same noise, picture by picture. Students '
        f'were made for their step count; the teacher is just given fewer steps.</p><div class="faces">{heads}{"".join(lines)}</div>'
    )


def grids_beside_each_other(subjects: Sequence[Subject]) -> str:
    """Several directories' pictures of the same seeds: at each step count a row a model; of others the sheets of their training."""
    return _same_noise(subjects) + _sheets(subjects)


def progress_section(subject: Subject) -> str:
    """What a run drew while it learnt: small, and of latent models the last sheet in large, prompts and all."""
    if not subject.progress:
        return ""
    heading = "The teacher while it learnt" if subject.pictures else "Samples while it learnt"
    text = "The same prompts and seeds each time." if subject.is_latent else "EMA weights, the same noise each time."
    last = f'<div class="sheet">{_figure(subject.latest)}</div>' if subject.latest else ""
    figures = "".join(map(_figure, subject.progress))
    return f'<h2>{heading}</h2><p class="soft">{text}</p>{last}<div class="progress">{figures}</div>'


def neighbours_section(subject: Subject) -> str:
    """Drawn images beside the training images nearest to them; nothing where no evaluation looked for them."""
    if not subject.neighbours:
        return ""
    figures = "".join(f'<div class="sheet">{_figure(sheet)}</div>' for sheet in subject.neighbours)
    return f'<h2>The nearest training images</h2><p class="soft">A model that has memorised draws the same picture.</p>{figures}'


def _same_noise(subjects: Sequence[Subject]) -> str:
    """A block a step count; models that several directories share (a chain's teacher that is there by itself, too) stand once."""
    rows: dict[int, dict[bytes, tuple[str, str]]] = {}
    for subject in subjects:
        measured = by_model(subject.measured)
        own = {picture.steps for picture in subject.pictures if picture.model == "student"}
        for picture in sorted(subject.pictures, key=lambda picture: picture.model):
            if picture.model == "teacher" and own and picture.steps <= max(own):
                continue  # a teacher that is cut to its students' steps is in its own chain's grid
            row = measured.get(picture.model, {}).get(picture.steps)
            label = f"{escape(subject.name)}{' (its teacher)' if picture.model == 'teacher' and own else ''}"
            pixels = picture.images.numpy().tobytes()
            if pixels not in rows.setdefault(picture.steps, {}):
                shown = strip(picture.images, f"{subject.name}, {picture.model}, {steps_text(picture.steps)}")
                rows[picture.steps][pixels] = (f"<b>{label}</b><small>{picture.sampler}{_distance(row)}</small>", shown)
    if sum(len(block) for block in rows.values()) < 2:
        return ""
    blocks = []
    for count in sorted(rows, reverse=True):
        lines = [f'<div class="label">{label}</div><div>{shown}</div>' for label, shown in rows[count].values()]
        blocks.append(f'<h3 class="of">{steps_text(count)}</h3><div class="beside">{"".join(lines)}</div>')
    text = "A column is one seed: every row starts from the same noise."
    return f'<h2>The same seeds, model by model</h2><p class="soft">{text}</p>{"".join(blocks)}'


def _sheets(subjects: Sequence[Subject]) -> str:
    """The last sheets of runs that have no pictures of the fixed seeds."""
    without = [subject for subject in subjects if not subject.pictures and (subject.latest or subject.progress)]
    if len(without) < 2:
        return ""
    last = {subject.name: subject.latest or subject.progress[-1] for subject in without}
    figures = "".join(_figure(Sheet(f"{name}, {sheet.caption}", sheet.png)) for name, sheet in last.items())
    wide = " wide" if any(subject.latest for subject in without) else ""
    return f'<h2>The last samples of each run</h2><p class="soft">The same seeds in each.</p><div class="sheets{wide}">{figures}</div>'


def _figure(sheet: Sheet) -> str:
    caption = escape(sheet.caption, quote=True)
    return f'<figure><img src="{data_uri(sheet.png)}" alt="{caption}"><figcaption>{caption}</figcaption></figure>'


def _count(count: int, seconds: float) -> str:
    return f'<div class="count"><b>{count}</b> {steps_text(count, bare=True)}<small>{duration(seconds)} an image</small></div>'


def _distance(row: Measured | None) -> str:
    value: Mapping[str, float] = row.values if row else {}
    return f", {_DISTANCE.title} {_DISTANCE.text(value[_DISTANCE.key])}" if _DISTANCE.key in value else ""
