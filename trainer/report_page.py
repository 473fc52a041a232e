"""The report as one HTML text: a pure function of what was gathered; nothing in it is fetched from anywhere."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import final

from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from trainer.evaluation import EvaluationRow
from trainer.pictures import PictureRow
from trainer.report_plots import Series, loss_plot, number_text, sparkline
from trainer.report_style import STYLE
from trainer.report_tables import comparison, evaluation_section, steps_text

_COLOURS = ("--student", "--teacher", "--third", "--fourth", "--fifth")
_SHARPEST_PIXELS = 96
# The browser itself holds the page to its promise that nothing is loaded from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@final
@dataclass(frozen=True)
class Stage:
    """A run's metrics.jsonl, a value a logged step."""

    name: str
    title: str
    updates: int
    """Optimizer steps that the recipe asks for."""
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    images_per_second: tuple[float, ...]
    step_seconds: tuple[float, ...]
    data_wait_seconds: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """Time in optimizer steps, those between two logged ones included."""
        return sum(self.step_seconds) / len(self.step_seconds) * (self.steps[-1] + 1) if self.steps else 0.0


@final
@dataclass(frozen=True)
class Subject:
    """One directory that the page reports on."""

    name: str
    kind: str
    """What it is, in a sentence's words."""
    facts: tuple[tuple[str, str], ...]
    stages: tuple[Stage, ...]
    pictures: tuple[PictureRow, ...]
    rows: tuple[EvaluationRow, ...]
    progress: tuple[tuple[str, bytes], ...]
    """Captions and PNG files of samples drawn while it was trained."""
    recipe: str
    credits: tuple[tuple[str, str], ...]
    """The training data's licence, as label and text."""


def page(subjects: Sequence[Subject]) -> str:
    """The whole document."""
    title = subjects[0].name if len(subjects) == 1 else " against ".join(subject.name for subject in subjects)
    body = [f'<p class="over">halfstep report</p><h1>{escape(title)}</h1>']
    if len(subjects) > 1:
        body.append(_compared(subjects))
    for subject in subjects:
        if len(subjects) > 1:
            body.append(f'<h1 class="next">{escape(subject.name)}</h1>')
        body.append(_subject(subject, curves=len(subjects) == 1))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)} - halfstep report</title><style>{STYLE}</style></head><body><main>{''.join(body)}"
        "<footer>Made by <code>halfstep report</code>. Pictures, curves and tables are inside this one file; it loads nothing else."
        "</footer></main></body></html>\n"
    )


def data_uri(png: bytes) -> str:
    """A PNG file as an address that needs no network."""
    return "data:image/png;base64," + base64.b64encode(png).decode("ascii")


def _subject(subject: Subject, *, curves: bool) -> str:
    """One directory's part; its curves only where they do not stand in a comparison already."""
    parts = [f'<p class="lead">{escape(subject.kind)}</p>', _tiles(subject)]
    if subject.pictures:
        parts.append(_faces(subject.pictures, subject.rows))
    parts.append(evaluation_section(subject.rows))
    if curves and any(stage.steps for stage in subject.stages):
        parts.append(_curves([subject]))
    parts.append(_stage_table(subject.stages))
    if subject.progress:
        figures = "".join(
            f'<figure><img src="{data_uri(png)}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'
            for caption, png in subject.progress
        )
        heading = "The teacher while it learnt" if subject.pictures else "Samples while it learnt"
        parts.append(f'<h2>{heading}</h2><p class="soft">EMA weights, the same noise each time.</p><div class="progress">{figures}</div>')
    facts = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in (*subject.facts, *subject.credits))
    parts.append(f'<h2>How it was made</h2><div class="card"><dl>{facts}</dl></div>')
    if subject.recipe:
        parts.append(f"<details><summary>The whole recipe</summary><pre>{escape(subject.recipe)}</pre></details>")
    return "".join(parts)


def _tiles(subject: Subject) -> str:
    """The few numbers that a reader looks for first."""
    tiles: list[tuple[str, str]] = []
    students = [row for row in subject.rows if row.model == "student"]
    slowest = max((row for row in subject.rows if row.model == "teacher"), key=lambda row: row.steps, default=None)
    if students and slowest:
        fastest = min(students, key=lambda row: row.steps)
        factor = slowest.seconds_per_image / fastest.seconds_per_image
        tiles.append((f"{slowest.steps} → {fastest.steps}", f"sampling {steps_text(slowest.steps, bare=True)}, teacher to student"))
        tiles.append((f"{factor:,.0f} ×" if factor >= 10 else f"{factor:.1f} ×", f"faster at {steps_text(fastest.steps)} than the teacher"))
        tiles.append((_duration(fastest.seconds_per_image), f"an image in {steps_text(fastest.steps)}, on one process"))
    trained = [stage for stage in subject.stages if stage.step_seconds]
    if trained:
        seconds = sum(stage.seconds for stage in trained)
        what = f"of training in {len(trained)} stages" if len(trained) > 1 else f"of training, {len(trained[0].steps):,} steps"
        tiles.append((_duration(seconds), what))
    if trained and len(trained) == 1:
        tiles.append((number_text(trained[0].losses[-1]), f"loss at step {trained[0].steps[-1]}"))
        tiles.append((f"{median(trained[0].images_per_second):,.0f}", "images a second, median"))
    cells = "".join(f'<div class="card tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""


def _faces(pictures: Sequence[PictureRow], rows: Sequence[EvaluationRow]) -> str:
    """The same-noise grid: a line a step count, the student made for it beside the teacher cut to it."""
    drawn = {(picture.model, picture.steps): picture for picture in pictures}
    counts = sorted({picture.steps for picture in pictures}, reverse=True)
    measured = {(row.model, row.steps): row for row in rows}
    lines = []
    for count in counts:
        seconds = drawn.get(("student", count), drawn.get(("teacher", count)))
        assert seconds is not None, "a count is listed because something was drawn"
        cost = _duration(seconds.seconds_per_image)
        lines.append(f'<div class="count"><b>{count}</b> {"step" if count == 1 else "steps"}<small>{cost} an image</small></div>')
        for model in ("student", "teacher"):
            picture, row = drawn.get((model, count)), measured.get((model, count))
            distance = f", Fréchet distance {row.frechet_distance:.2f}" if row and row.frechet_distance is not None else ""
            label = f'<span class="who {model}">{model}{distance}</span>'
            if picture is None:
                why = "This is the model that all students come from." if count == counts[0] and model == "student" else "not trained"
                lines.append(f'<div class="none">{label}{why}</div>')
            else:
                lines.append(f"<div>{label}{_strip(picture.images, f'{model}, {steps_text(count)}{distance}')}</div>")
    heads = (
        '<div class="head"></div><div class="head student">Student made for so many steps</div>'
        '<div class="head teacher">Teacher run in so many DDIM steps</div>'
    )
    return (
        '<h2>The same noise, ever fewer steps</h2><p class="soft">Every row starts from the same noise, face by face. Students '
        f'were made for their step count; the teacher is just given fewer steps.</p><div class="faces">{heads}{"".join(lines)}</div>'
    )


def _strip(images: UInt8[Tensor, "b h w c"], label: str) -> str:
    cells = []
    for number, image in enumerate(images.numpy()):
        tile = Image.fromarray(image.squeeze())
        factor = max(1, _SHARPEST_PIXELS // max(tile.size))
        if factor > 1:
            tile = tile.resize((tile.width * factor, tile.height * factor), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        tile.save(buffer, format="PNG", optimize=True)
        cells.append(f'<img src="{data_uri(buffer.getvalue())}" alt="{escape(label)}, face {number + 1}">')
    return f'<div class="row">{"".join(cells)}</div>'


def _curves(subjects: Sequence[Subject]) -> str:
    """A plot a stage; several directories share the plots of stages of one title."""
    titles = list(dict.fromkeys(stage.title for subject in subjects for stage in subject.stages if stage.steps))
    colours = dict(zip((subject.name for subject in subjects), _COLOURS * len(subjects), strict=False))
    plots = []
    for title in titles:
        shown = [(subject, stage) for subject in subjects for stage in subject.stages if stage.title == title and stage.steps]
        series = [
            Series(
                subject.name, tuple(map(float, stage.steps)), stage.losses, colours[subject.name] if len(subjects) > 1 else _colour(stage)
            )
            for subject, stage in shown
        ]
        last = ", ".join(number_text(stage.losses[-1]) for _, stage in shown)
        plot = loss_plot(series, title=title) + (loss_plot(series, title=title, wide=True) if len(titles) == 1 else "")
        plots.append(f'<figure class="card">{plot}<figcaption><b>{escape(title)}</b> · last loss {last}</figcaption></figure>')
    legend = ""
    if len(subjects) > 1:
        entries = "".join(
            f'<span><i style="background:var({colours[subject.name]})"></i>{escape(subject.name)}</span>' for subject in subjects
        )
        legend = f'<div class="legend">{entries}</div>'
    return (
        '<h2>Loss curves</h2><p class="soft">Over optimizer steps, logarithmic. Pale: every logged step; bold: moving average.</p>'
        f'{legend}<div class="{"plots" if len(plots) > 1 else "plot_alone"}">{"".join(plots)}</div>'
    )


def _colour(stage: Stage) -> str:
    return "--teacher" if stage.title.startswith("Teacher") else "--student"


def _stage_table(stages: Sequence[Stage]) -> str:
    trained = [stage for stage in stages if stage.steps]
    if not trained:
        return ""
    names = ("Optimizer steps", "Time", "Images/s, median", "Images/s over time", "Waiting for data", "Last loss")
    lines = []
    for stage in trained:
        done = stage.steps[-1] + 1
        cells = (
            f"{done:,}" if done == stage.updates else f"{done:,} of {stage.updates:,}",
            _duration(stage.seconds),
            f"{median(stage.images_per_second):,.0f}",
            sparkline(stage.images_per_second),
            f"{100 * sum(stage.data_wait_seconds) / max(sum(stage.step_seconds), 1e-9):.1f} %",
            number_text(stage.losses[-1]),
        )
        lines.append(f"<tr><td>{escape(stage.title)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "<th>Stage</th>" + "".join(f"<th>{name}</th>" for name in names)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    return f'<h2>Training speed</h2><div class="scroll">{table}</div>'


def _compared(subjects: Sequence[Subject]) -> str:
    """What several directories have in common: curves in shared plots, distances where they were measured alike."""
    measured: Mapping[str, tuple[EvaluationRow, ...]] = {subject.name: subject.rows for subject in subjects if subject.rows}
    parts = [comparison(measured, colours=_COLOURS)] if len(measured) > 1 else []
    if any(stage.steps for subject in subjects for stage in subject.stages):
        parts.append(_curves(subjects))
    return "".join(parts)


def _duration(seconds: float) -> str:
    """Seconds in the unit that a person would say them in."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
