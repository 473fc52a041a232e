"""Quality by step count: a student, the teacher run in as few steps and the student before it; and directories beside each other."""

from collections.abc import Mapping, Sequence
from html import escape

from trainer.report.evaluated import ByCount, by_model, differences, has_quality, measured_alike, own_rows
from trainer.report.html import COLOURS, heads, legend, steps_text, table
from trainer.report.measures import MODELS, QUALITY, Measure
from trainer.report.plots import Series, steps_plot
from trainer.report.subject import Measured

BASE_STEPS = 32
_FIRST = QUALITY[0].key
_TITLES = {"student": "Student", "teacher": "Teacher", "previous": "Previous student"}


def quality_section(rows: Sequence[Measured]) -> str:
    """Plots and a table of one directory's rows, a set for each way they were measured; nothing where there are none."""
    groups = measured_alike(rows)
    parts = ["<h2>Quality by step count</h2>"] if groups else []
    if len(groups) > 1:
        parts.append(f'<p class="notice">Measured in {len(groups)} ways, which are not compared: {escape(_ways(groups))}.</p>')
    for group in groups:
        measures = present(group)
        models = by_model(group)
        if "student" in models or "previous" in models:
            parts.append(f'<p class="soft">{_lines_text(models)}</p>')
        series = {
            measure.key: [_series(_name(model), found, measure, _colour(model)) for model, found in models.items()] for measure in measures
        }
        parts += [_plots(measures, series), _table(models, measures), f'<p class="soft">{yardstick_text(group)}</p>']
    return "".join(parts)


def compared_quality(measured: Mapping[str, Sequence[Measured]]) -> str:
    """What several directories' students (of a lone teacher: it) reach, side by side; a refusal where they were not measured alike."""
    own = {name: [row for row in own_rows(rows) if has_quality(row)] for name, rows in measured.items()}
    own = {name: rows for name, rows in own.items() if rows}
    if len(own) < 2:
        return ""
    everything = [row for rows in own.values() for row in rows]
    if len(measured_alike(everything)) > 1:
        return f'<h2>Quality by step count</h2><p class="notice">Not compared. {escape(differences(everything))}</p>'
    if len({row.steps for row in everything}) == 1:
        return ""  # the table of what differs has it
    measures = present(everything)
    colours = dict(zip(own, COLOURS * len(own), strict=False))
    found = {name: {row.steps: row for row in rows} for name, rows in own.items()}
    series = {measure.key: [_series(name, rows, measure, colours[name]) for name, rows in found.items()] for measure in measures}
    tables = "".join(_by_directory(found, measure) for measure in measures)
    plots = _plots(measures, series) if len(own) <= len(COLOURS) else ""
    return f'<h2>Quality by step count</h2>{plots}{tables}<p class="soft">{yardstick_text(everything)}</p>'


def present(rows: Sequence[Measured]) -> list[Measure]:
    """The measures that any of the rows has."""
    return [measure for measure in QUALITY if any(measure.key in row.values for row in rows)]


def best_class(measure: Measure, value: float | None, values: Sequence[float]) -> str:
    """Marks the best of several values, where one is worse."""
    if value is None or any(measure.is_better(other, value) for other in values):
        return ""
    return ' class="best"' if any(measure.is_better(value, other) for other in values) else ""


def yardstick_text(rows: Sequence[Measured]) -> str:
    """What the numbers of rows that were measured alike were measured with."""
    notes = rows[0].notes
    folder, _, sha256 = str(notes.get("reference", "")).partition("@")
    parts = [f"{notes.get('images', '?')} images a row from seed {notes.get('seed', '?')}"]
    if notes.get("precision"):
        parts.append(f"drawn in {notes['precision']}")
    if folder:
        parts.append(f"against the images of {folder} ({sha256[:19]})")
    text = f"{', '.join(parts)}. Feature net {notes.get('feature_net', 'not known')}"
    accuracy = notes.get("feature_net_accuracy")
    text += f", which names {accuracy:.0%} of held-out attributes." if isinstance(accuracy, float) else "."
    teacher = next((row.notes["attribute_teacher_steps"] for row in rows if row.notes.get("attribute_teacher_steps")), None)
    if isinstance(teacher, int):
        text += f" Attributes kept: those that read as on the teacher's image in {steps_text(teacher)} from the same noise."
    return escape(f"{text} Compare them within this page, never with numbers of another feature net.")


def _ways(groups: Sequence[Sequence[Measured]]) -> str:
    return differences([group[0] for group in groups])


def _lines_text(models: Mapping[str, ByCount]) -> str:
    told = {
        "student": "Students were made for their step count",
        "teacher": "the teacher is just given fewer steps",
        "previous": "the previous student is the one of twice the steps, run in as few: what a stage starts from",
    }
    return "; ".join(text for model, text in told.items() if model in models) + "."


def _plots(measures: Sequence[Measure], series: Mapping[str, Sequence[Series]]) -> str:
    """A plot a measure that has a line, each with its name and which way is better."""
    figures = []
    for measure in measures:
        lines = [each for each in series[measure.key] if each.xs]
        if not any(len(each.xs) > 1 for each in lines):
            continue
        plot = steps_plot(lines, title=f"{measure.title} over sampling steps", small=True)
        caption = f"<b>{escape(measure.title)}</b> · {measure.better} is better. {escape(measure.about)}"
        figures.append(f'<figure class="card">{plot}{legend(lines)}<figcaption>{caption}</figcaption></figure>')
    return f'<div class="plots">{"".join(figures)}</div>' if figures else ""


def _series(label: str, rows: ByCount, measure: Measure, colour: str) -> Series:
    counts = sorted(count for count, row in rows.items() if measure.key in row.values)
    return Series(label, tuple(map(float, counts)), tuple(rows[count].values[measure.key] * measure.scale for count in counts), colour)


def _table(models: Mapping[str, ByCount], measures: Sequence[Measure]) -> str:
    """A line a step count and model; in each count the best of the models is marked."""
    base = _base(models.get("student", {}))
    titles = [measure.title for measure in measures]
    if base:
        titles.insert(1, f"Of {steps_text(base.steps)}")
    lines = []
    for count in sorted({count for rows in models.values() for count in rows}, reverse=True):
        there = {model: rows[count] for model, rows in models.items() if count in rows}
        for number, (model, row) in enumerate(there.items()):
            first = f'<td rowspan="{len(there)}">{count}</td>' if number == 0 else ""
            cells = [_cell(measure, row, list(there.values())) for measure in measures]
            if base:
                cells.insert(1, f"<td>{_ratio(row, base) if model == 'student' else ''}</td>")
            lines.append(f'{first}<td class="model {_class(model)}">{_TITLES.get(model, escape(model))}</td>{"".join(cells)}')
    return table(f'<th>Steps</th><th class="model">Model</th>{heads(titles)}', lines, style="grouped")


def _by_directory(found: Mapping[str, ByCount], measure: Measure) -> str:
    """One measure of several directories: a line a directory, a column a step count."""
    counts = sorted({count for rows in found.values() for count, row in rows.items() if measure.key in row.values}, reverse=True)
    there = {count: [rows[count] for rows in found.values() if count in rows] for count in counts}
    lines = [
        f"<td>{escape(name)}</td>{''.join(_cell(measure, rows.get(count), there[count]) for count in counts)}"
        for name, rows in found.items()
    ]
    titles = ["Run", *(steps_text(count) for count in counts)]
    return f'<h3 class="of">{escape(measure.title)}, {measure.better} is better</h3>{table(heads(titles), lines, style="compared")}'


def _cell(measure: Measure, row: Measured | None, others: Sequence[Measured]) -> str:
    value = row.values.get(measure.key) if row else None
    values = [other.values[measure.key] for other in others if measure.key in other.values]
    return f"<td{best_class(measure, value, values)}>{'–' if value is None else measure.text(value)}</td>"


def _base(students: ByCount) -> Measured | None:
    """The student that the others' distances are multiples of: that of 32 steps, else of the most steps that were measured."""
    measured = [count for count, row in students.items() if row.values.get(_FIRST)]
    return students[BASE_STEPS if BASE_STEPS in measured else max(measured)] if measured else None


def _ratio(row: Measured, base: Measured) -> str:
    value = row.values.get(_FIRST)
    return "–" if value is None else f"× {value / base.values[_FIRST]:.2f}"


def _name(model: str) -> str:
    return MODELS[model][0] if model in MODELS else model


def _colour(model: str) -> str:
    return MODELS[model][2] if model in MODELS else "--fourth"


def _class(model: str) -> str:
    return model if model in MODELS else ""
