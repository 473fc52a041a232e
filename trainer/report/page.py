"""The report as one HTML text: a pure function of what was gathered; nothing in it is fetched from anywhere."""

from collections.abc import Sequence
from html import escape
from statistics import median

from trainer.report.compare import comparison_table
from trainer.report.cost import cost_section
from trainer.report.curves import curves_section, final_loss, stage_table
from trainer.report.grids import chain_grid, grids_beside_each_other, neighbours_section, progress_section
from trainer.report.html import duration, steps_text
from trainer.report.plots import number_text
from trainer.report.quality import compared_quality, quality_section
from trainer.report.style import STYLE
from trainer.report.subject import Subject
from trainer.report.timing import seconds_of, timing_section

_FOLDED = 4
"""Of more directories than this each one's own part is folded."""
# The browser itself holds the page to its promise that nothing is loaded from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(subjects: Sequence[Subject], *, title: str | None = None) -> str:
    """The whole document. title: empty for the directories' names."""
    several = len(subjects) > 1
    title = title or (" against ".join(subject.name for subject in subjects) if len(subjects) <= _FOLDED else f"{len(subjects)} runs")
    body = [f'<p class="over">halfstep report</p><h1>{escape(title)}</h1>']
    body += (
        [_compared(subjects), *map(_part, subjects, [len(subjects)] * len(subjects))] if several else [_subject(subjects[0], alone=True)]
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)} - halfstep report</title><style>{STYLE}</style></head><body><main>{''.join(body)}"
        "<footer>Made by <code>halfstep report</code>. Pictures, curves and tables are inside this one file; it loads nothing else."
        "</footer></main></body></html>\n"
    )


def _compared(subjects: Sequence[Subject]) -> str:
    """What several directories have in common: what differs, grids of the same seeds, quality, time, curves."""
    parts = [
        comparison_table(subjects),
        grids_beside_each_other(subjects),
        compared_quality({subject.name: subject.measured for subject in subjects}),
        timing_section(subjects),
        curves_section(subjects),
    ]
    return "".join(parts)


def _part(subject: Subject, of: int) -> str:
    """One directory's own part among several; of many it is folded."""
    body = _subject(subject, alone=False)
    if of > _FOLDED:
        return f'<details class="part"><summary>{escape(subject.name)}</summary>{body}</details>'
    return f'<h1 class="next">{escape(subject.name)}</h1>{body}'


def _subject(subject: Subject, *, alone: bool) -> str:
    """One directory's part; its curves only where they do not stand in a comparison already."""
    parts = [f'<p class="lead">{escape(subject.kind)}</p>']
    parts += [f'<p class="notice">{escape(notice)}</p>' for notice in subject.notices]
    parts.append(_tiles(subject))
    if len(subject.pictures) > 1 or (alone and subject.pictures):
        parts.append(chain_grid(subject.pictures, subject.measured))
    parts += [quality_section(subject.measured), neighbours_section(subject)]
    if alone or any(row.model != "student" for row in subject.measured):
        parts.append(timing_section([subject]))
    if alone:
        parts.append(curves_section([subject]))
    parts += [cost_section(subject), stage_table(subject.stages), progress_section(subject)]
    facts = "".join(f"<dt>{escape(label)}</dt><dd>{escape(text)}</dd>" for label, text in (*subject.facts, *subject.credits))
    parts.append(f'<h2>How it was made</h2><div class="card"><dl>{facts}</dl></div>')
    if subject.recipe:
        parts.append(f"<details><summary>The whole recipe</summary><pre>{escape(subject.recipe)}</pre></details>")
    return "".join(parts)


def _tiles(subject: Subject) -> str:
    """The few numbers that a reader looks for first."""
    tiles: list[tuple[str, str]] = []
    seconds = seconds_of(subject)
    students, teachers = seconds.get("student", {}), seconds.get("teacher", {})
    if students and teachers:
        most, least = max(teachers), min(students)
        factor = teachers[most] / students[least]
        tiles.append((f"{most} → {least}", f"sampling {steps_text(most, bare=True)}, teacher to student"))
        tiles.append((f"{factor:,.0f} ×" if factor >= 10 else f"{factor:.1f} ×", f"faster at {steps_text(least)} than the teacher"))
        tiles.append((duration(students[least]), f"an image in {steps_text(least)}, on one process"))
    trained = [stage for stage in subject.stages if stage.step_seconds]
    if trained:
        total = sum(stage.seconds for stage in trained)
        what = f"of training in {len(trained)} stages" if len(trained) > 1 else f"of training, {trained[0].done:,} steps"
        tiles.append((duration(total), what))
    if trained and len(trained) == 1:
        tiles.append((number_text(final_loss(trained[0])), f"loss at step {trained[0].steps[-1]}"))
        tiles.append((f"{median(trained[0].images_per_second):,.3g}", "images a second, median"))
    cells = "".join(f'<div class="card tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles)
    return f'<div class="tiles">{cells}</div>' if tiles else ""
