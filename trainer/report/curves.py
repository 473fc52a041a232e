"""Loss curves (the paper's figures 9, 11 and 14), shared by several directories or beside each other, and training speed."""

from collections.abc import Sequence
from html import escape
from statistics import median

from trainer.report.html import COLOURS, duration, heads, legend, table
from trainer.report.plots import Series, loss_plot, loss_span, number_text, smoothed, sparkline
from trainer.report.subject import Stage, Subject

_SHARED = 5
"""As many curves as there are colours to tell them apart; more of them get a small plot each."""


def curves_section(subjects: Sequence[Subject]) -> str:
    """A plot a stage; several directories share the plots of stages of one title, many of them get a small plot each."""
    titles = list(dict.fromkeys(stage.title for subject in subjects for stage in subject.stages if stage.steps))
    colours = dict(zip((subject.name for subject in subjects), COLOURS * len(subjects), strict=False))
    plots, many = [], []
    for title in titles:
        shown = [(subject, stage) for subject in subjects for stage in subject.stages if stage.title == title and stage.steps]
        if len(shown) > _SHARED:
            many.append(_small_multiples(title, shown))
            continue
        series = [_series(subject, stage, colours[subject.name] if len(subjects) > 1 else _colour(stage)) for subject, stage in shown]
        last = ", ".join(number_text(final_loss(stage)) for _, stage in shown)
        plot = loss_plot(series, title=title) + (loss_plot(series, title=title, wide=True) if len(titles) == 1 else "")
        note = f"loss at the end {last}" if plot else "no loss that can be drawn"
        plots.append(f'<figure class="card">{plot}<figcaption><b>{escape(title)}</b> · {note}</figcaption></figure>')
    if not plots and not many:
        return ""
    names = legend([Series(subject.name, (), (), colours[subject.name]) for subject in subjects]) if len(subjects) > 1 and plots else ""
    shared = f'{names}<div class="{"plots" if len(plots) > 1 else "plot_alone"}">{"".join(plots)}</div>' if plots else ""
    text = "Over optimizer steps, logarithmic. Pale: every logged step, or the other runs; bold: moving average."
    return f'<h2>Loss curves</h2><p class="soft">{text}</p>{shared}{"".join(many)}'


def final_loss(stage: Stage) -> float:
    """The moving average of a run's losses at its last logged step."""
    return smoothed(stage.losses)[-1]


def stage_table(stages: Sequence[Stage]) -> str:
    """What each stage took: steps, time, images a second, the share of time that it waited for data."""
    trained = [stage for stage in stages if stage.steps]
    if not trained:
        return ""
    names = ("Stage", "Optimizer steps", "Time", "Images/s, median", "Images/s over time", "Waiting for data", "Loss at the end")
    lines = []
    for stage in trained:
        cells = (
            steps_done(stage),
            duration(stage.seconds),
            f"{median(stage.images_per_second):,.3g}",
            sparkline(stage.images_per_second),
            f"{100 * sum(stage.data_wait_seconds) / max(sum(stage.step_seconds), 1e-9):.1f} %",
            number_text(final_loss(stage)),
        )
        lines.append(f"<td>{escape(stage.title)}</td>{''.join(f'<td>{cell}</td>' for cell in cells)}")
    return f"<h2>Training speed</h2>{table(heads(names), lines)}"


def steps_done(stage: Stage) -> str:
    """`500`, or of a run that has not come to its end `300 of 500`."""
    return f"{stage.done:,}" if stage.done >= stage.updates else f"{stage.done:,} of {stage.updates:,}"


def _small_multiples(title: str, shown: Sequence[tuple[Subject, Stage]]) -> str:
    """A small plot a run on the axes of all, the others pale behind it."""
    lines = [_series(subject, stage, "--student") for subject, stage in shown]
    drawable = [line for line in lines if loss_plot([line], title=title)]
    span = loss_span(drawable) if drawable else None
    figures = []
    for line, (subject, stage) in zip(lines, shown, strict=True):
        others = [other for other in drawable if other is not line]
        plot = loss_plot([line], title=f"{subject.name}, {title}", behind=others, span=span)
        caption = f"<b>{escape(subject.name)}</b> · {number_text(final_loss(stage))}"
        figures.append(f'<figure class="card">{plot}<figcaption>{caption}</figcaption></figure>')
    return f'<h3 class="of">{escape(title)}</h3><div class="plots many">{"".join(figures)}</div>'


def _series(subject: Subject, stage: Stage, colour: str) -> Series:
    return Series(subject.name, tuple(map(float, stage.steps)), stage.losses, colour)


def _colour(stage: Stage) -> str:
    return "--student" if stage.title.startswith("Student") else "--teacher"
