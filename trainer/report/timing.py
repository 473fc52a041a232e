"""Seconds an image by step count (the paper's table 1): measured rows, and where there are none the pictures that were drawn."""

from collections.abc import Mapping, Sequence
from html import escape

from trainer.report.html import COLOURS, duration, heads, legend, steps_text, table
from trainer.report.measures import IMAGES, MODELS, SECONDS
from trainer.report.plots import Series, steps_plot
from trainer.report.subject import Measured, Subject

_HOW = (
    "Seconds of all processes together, over all images; numbers of one machine are comparable with each other. "
    "Drawing takes about as long as its network calls, so half the steps take half the time."
)
_Seconds = Mapping[int, float]
"""Seconds an image by step count."""


def timing_section(subjects: Sequence[Subject]) -> str:
    """Plot and table of seconds an image: of one directory its models, of several each one's own; nothing without numbers."""
    single = len(subjects) == 1
    found: dict[str, tuple[_Seconds, str]] = {}
    for subject, colour in zip(subjects, COLOURS * len(subjects), strict=False):
        models = seconds_of(subject)
        if single:
            named = {model: MODELS.get(model, (model, "", "--fourth")) for model in models}
            found = {named[model][0].capitalize(): (seconds, named[model][2]) for model, seconds in models.items()}
        elif own := {**models.get("teacher", {}), **models.get("student", {})}:
            found[subject.name] = (own, colour)
    if not found:
        return ""
    counts = sorted({count for seconds, _ in found.values() for count in seconds}, reverse=True)
    columns = {name: seconds for name, (seconds, _) in found.items()}
    body = _by_count(columns, counts, _images_per_second(subjects[0])) if single else _by_run(columns, counts)
    series = [
        Series(name, tuple(map(float, sorted(seconds))), tuple(seconds[count] for count in sorted(seconds)), colour)
        for name, (seconds, colour) in found.items()
    ]
    if len(counts) > 1 and len(found) <= len(COLOURS):
        plot = steps_plot(series, title=f"{SECONDS.title} over sampling steps")
        body = f'<div class="two"><figure class="card">{plot}{legend(series)}</figure>{body}</div>'
    batches = "".join(_batches(subject, name=not single) for subject in subjects)
    return f'<h2>Seconds an image by step count</h2><p class="soft">{escape(_HOW)}</p>{body}{batches}'


def _by_count(columns: Mapping[str, _Seconds], counts: Sequence[int], images: Mapping[int, float]) -> str:
    """A line a step count, a column a model, and how much faster the fastest is than the most steps."""
    slowest = max(seconds[counts[0]] for seconds in columns.values() if counts[0] in seconds)
    lines = []
    for count in counts:
        values = [seconds.get(count) for seconds in columns.values()]
        least = min(value for value in values if value is not None)
        cells = "".join(_cell(value) for value in values)
        more = f"<td>{images[count]:.3g}</td>" if count in images else "<td>–</td>" if images else ""
        lines.append(f"<td>{count}</td>{cells}<td>{_factor(slowest / least)}</td>{more}")
    titles = ["Steps", *columns, f"Faster than {counts[0]} steps", *([IMAGES.title] if images else [])]
    return table(heads(titles), lines)


def _by_run(runs: Mapping[str, _Seconds], counts: Sequence[int]) -> str:
    """A line a run, a column a step count."""
    lines = [f"<td>{escape(name)}</td>{''.join(_cell(seconds.get(count)) for count in counts)}" for name, seconds in runs.items()]
    return table(heads(["Run", *(steps_text(count) for count in counts)]), lines, style="compared")


def _cell(value: float | None) -> str:
    return f"<td>{'–' if value is None else duration(value)}</td>"


def seconds_of(subject: Subject) -> dict[str, dict[int, float]]:
    """Seconds an image of each model by step count: those of evaluation.json, else those that the pictures took."""
    found: dict[str, dict[int, float]] = {}
    for picture in subject.pictures:
        found.setdefault(picture.model, {})[picture.steps] = picture.seconds_per_image
    for row in subject.measured:
        if SECONDS.key in row.values:
            found.setdefault(row.model, {})[row.steps] = row.values[SECONDS.key]
    return {model: found[model] for model in [*MODELS, *sorted(found.keys() - MODELS.keys())] if model in found}


def _batches(subject: Subject, *, name: bool) -> str:
    """Images a second by batch size, a line a model and step count, where an evaluation timed batches."""
    found = [(row, timings) for row in subject.measured if (timings := _timings(row))]
    sizes = sorted({size for _, timings in found for size in timings})
    if not found:
        return ""
    lines = []
    for row, timings in found:
        cells = "".join(f"<td>{timings[size]:.3g}</td>" if size in timings else "<td>–</td>" for size in sizes)
        lines.append(f"<td>{row.steps} · {escape(MODELS.get(row.model, (row.model,))[0])}</td>{cells}")
    title = f"{escape(subject.name)}: images" if name else "Images"
    return f'<h3 class="of">{title} a second by batch size</h3>{table(heads(["Steps", *(f"{size} at once" for size in sizes)]), lines)}'


def _timings(row: Measured) -> dict[int, float]:
    """Images a second of a row by batch size."""
    entries = row.notes.get("timings")
    found: dict[int, float] = {}
    for entry in entries if isinstance(entries, list) else []:
        match entry:
            case {"batch_images": int(size), "images_per_second": int() | float() as speed}:
                found[size] = float(speed)
    return found


def _images_per_second(subject: Subject) -> dict[int, float]:
    """The most images a second of any model, by step count."""
    found: dict[int, float] = {}
    for row in subject.measured:
        if IMAGES.key in row.values:
            found[row.steps] = max(found.get(row.steps, 0.0), row.values[IMAGES.key])
    return found


def _factor(value: float) -> str:
    return f"{value:,.0f} ×" if value >= 10 else f"{value:.1f} ×"
