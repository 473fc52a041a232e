"""The report's tables of distances: students beside the teacher cut to the same steps, and directories beside each other."""

from collections.abc import Mapping, Sequence
from html import escape

from trainer.evaluation import EvaluationRow, ratio
from trainer.report_plots import Series, distance_plot

BASE_STEPS = 32
_SECONDS = "Seconds an image: those of all processes together, over all images; above 32 steps only these are measured."

_Rows = Mapping[int, EvaluationRow]
"""One model's rows by step count."""


def steps_text(count: int, *, bare: bool = False) -> str:
    """`1 step`, `8 steps`; bare: the word alone."""
    word = "step" if count == 1 else "steps"
    return word if bare else f"{count} {word}"


def evaluation_section(rows: Sequence[EvaluationRow]) -> str:
    """Plot and table of one directory's rows; nothing where there are none."""
    if not rows:
        return ""
    students, teachers = ({row.steps: row for row in rows if row.model == model} for model in ("student", "teacher"))
    base = _base(students)
    lines = []
    for count in sorted({row.steps for row in rows}, reverse=True):
        student, teacher = students.get(count), teachers.get(count)
        cells = [f"<td>{count}</td>"]
        if students:
            cells += _cells(student, better=_is_better(student, teacher), base=base)
        if teachers:
            cells += _cells(teacher, better=_is_better(teacher, student), edge=bool(students))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    body = f"{_table_head(students, teachers, base)}<tbody>{''.join(lines)}</tbody>"
    table = f'<div class="scroll"><table>{body}</table></div>'
    return f"<h2>Quality and speed</h2>{_plot(students, teachers)}{table}{_measured_how(rows)}"


def _table_head(students: _Rows, teachers: _Rows, base: EvaluationRow | None) -> str:
    """Two lines: the models, then what is measured of each."""
    names = ["Fréchet distance", "KID × 1000", "Attributes kept", "Seconds an image"]
    models, columns = "", ""
    titles = {"student": "Student made for so many steps", "teacher": "Teacher run in so many DDIM steps"}
    for model, rows in (("student", students), ("teacher", teachers)):
        if not rows:
            continue
        edge = " split" if model == "teacher" and students else ""
        shown = [names[0], f"Ratio to {steps_text(base.steps)}", *names[1:]] if base and model == "student" else names
        models += f'<th colspan="{len(shown)}" class="{model}{edge}">{titles[model]}</th>'
        columns += f'<th class="{edge.strip()}">{shown[0]}</th>' + "".join(f"<th>{name}</th>" for name in shown[1:])
    return f'<thead><tr><th rowspan="2">Steps</th>{models}</tr><tr class="columns">{columns}</tr></thead>'


def comparison(measured: Mapping[str, Sequence[EvaluationRow]], *, colours: Sequence[str]) -> str:
    """Students' distances of several directories side by side; a refusal where they were not measured alike."""
    distances = {name: {row.steps: row for row in rows if row.frechet_distance is not None} for name, rows in _best_model(measured).items()}
    distances = {name: rows for name, rows in distances.items() if rows}
    if len(distances) < 2:
        return ""
    (first_name, first), *others = distances.items()
    one = next(iter(first.values()))
    for name, rows in others:
        other = next(iter(rows.values()))
        try:
            one.yardstick.check_equal(other.yardstick, mine=first_name, others=name)
        except ValueError as error:
            return f'<h2>Distances</h2><p class="notice">Not compared. {escape(str(error))}</p>'
    counts = sorted({count for rows in distances.values() for count in rows}, reverse=True)
    lines = []
    for count in counts:
        values = {name: rows[count].frechet_distance for name, rows in distances.items() if count in rows}
        least = min(value for value in values.values() if value is not None)
        cells = "".join(
            "<td>–</td>" if (value := values.get(name)) is None else f"<td{_best(value == least and len(values) > 1)}>{value:.2f}</td>"
            for name in distances
        )
        lines.append(f"<tr><td>{count}</td>{cells}</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in distances)
    series = [_series(name, rows, colour) for (name, rows), colour in zip(distances.items(), list(colours) * len(distances), strict=False)]
    plot = distance_plot(series, title="Frechet distance over sampling steps")
    return (
        f'<h2>Fréchet distances</h2><div class="two"><figure class="card">{plot}{_legend(series)}</figure>'
        f'<div class="scroll"><table><thead><tr><th>Steps</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div></div>'
        f'<p class="soft">{_yardstick_text(one)}</p>'
    )


def _best_model(measured: Mapping[str, Sequence[EvaluationRow]]) -> dict[str, list[EvaluationRow]]:
    """Of each directory its students' rows, of a lone teacher the teacher's."""
    chosen = {}
    for name, rows in measured.items():
        students = [row for row in rows if row.model == "student"]
        chosen[name] = students or list(rows)
    return chosen


def _base(students: _Rows) -> EvaluationRow | None:
    """The student that the others' distances are multiples of: that of 32 steps, else of the most steps that were measured."""
    measured = [count for count, row in students.items() if row.frechet_distance]
    return students[BASE_STEPS if BASE_STEPS in measured else max(measured)] if measured else None


def _cells(row: EvaluationRow | None, *, better: bool, base: EvaluationRow | None = None, edge: bool = False) -> list[str]:
    """Distance, its ratio to the base's where there is a base, KID, attributes, seconds; a dash where there is no number."""
    values: list[str | None] = [None] * 4
    share = ratio(row, base) if row and base else None
    if row:
        values = [
            None if row.frechet_distance is None else f"{row.frechet_distance:.2f}",
            None if row.kid is None else f"{1000 * row.kid:.1f}",
            None if row.attribute_accuracy is None else f"{100 * row.attribute_accuracy:.0f} %",
            f"{row.seconds_per_image:.3g}",
        ]
    if base:
        values.insert(1, None if share is None else f"{share:.2f}")
    first = f"{'split' if edge else ''}{' best' if better else ''}".strip()
    return [f'<td class="{first if number == 0 else ""}">{value or "–"}</td>' for number, value in enumerate(values)]


def _is_better(row: EvaluationRow | None, other: EvaluationRow | None) -> bool:
    """Whether a row's distance is below that of the other model at the same count."""
    if row is None or other is None:
        return False
    share = ratio(row, other)
    return share is not None and share < 1


def _plot(students: _Rows, teachers: _Rows) -> str:
    series = [_series("student", students, "--student"), _series("teacher", teachers, "--teacher")]
    if not any(len(each.xs) > 1 for each in series):
        return ""
    series = [each for each in series if each.xs]
    plot = distance_plot(series, title="Frechet distance over sampling steps")
    note = (
        "<h3>Lower is better</h3><p>The Fréchet distance tells how far the drawn images, taken together, are from real ones that "
        "no model was trained on. Both axes are logarithmic.</p><p>It is measured on the features of a small network that learnt to read "
        "the images' attributes. So compare it within this page, never with numbers from papers or of another feature net.</p>"
    )
    return f'<div class="two"><figure class="card">{plot}{_legend(series)}</figure><div class="soft">{note}</div></div>'


def _series(label: str, rows: _Rows, colour: str) -> Series:
    counts = sorted(count for count, row in rows.items() if row.frechet_distance)
    return Series(label, tuple(map(float, counts)), tuple(rows[count].frechet_distance or 0.0 for count in counts), colour)


def _legend(series: Sequence[Series]) -> str:
    entries = "".join(f'<span><i style="background:var({each.colour})"></i>{escape(each.label)}</span>' for each in series)
    return f'<div class="legend">{entries}</div>'


def _yardstick_text(row: EvaluationRow) -> str:
    """What the distances of a row were measured with."""
    folder, _, sha256 = row.reference.partition("@")
    return (
        f"{row.images:,} images a row from seed {row.seed}, drawn in {row.precision}, against the images of <code>{escape(folder)}</code> "
        f"(<code>{escape(sha256[:19])}</code>). Feature net <code>{escape(row.feature_net)}</code>, which names "
        f"{100 * row.feature_net_accuracy:.0f} % of held-out attributes."
    )


def _measured_how(rows: Sequence[EvaluationRow]) -> str:
    """What the table's numbers are, in one paragraph."""
    measured = next((row for row in rows if row.frechet_distance is not None), None)
    yardstick = _yardstick_text(measured) if measured else ""
    teacher = next((row.attribute_teacher_steps for row in rows if row.attribute_teacher_steps), None)
    kept = f"Attributes kept: those that read as on the teacher's image in {steps_text(teacher)} from the same noise." if teacher else ""
    return f'<p class="soft">{yardstick} {kept} {_SECONDS}</p>'


def _best(best: bool) -> str:
    return ' class="best"' if best else ""
