"""Several runs beside each other, an ablation or a sweep: what differs between their recipes, and what came of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from math import isfinite

from trainer.config_data import DATA_SHA256
from trainer.report.curves import final_loss, steps_done
from trainer.report.evaluated import has_quality, measured_alike, own_rows
from trainer.report.html import duration, heads, steps_text, table
from trainer.report.measures import SECONDS, Measure
from trainer.report.plots import number_text
from trainer.report.quality import best_class, present
from trainer.report.subject import Measured, Subject

_MOST_COLUMNS, _MOST_LINES = 5, 8
_LOSS_KEYS = ("objective.", "noise_schedule.", "distill.", "data.", "model.kind")
"""Recipe keys whose difference makes losses of another meaning."""


def comparison_table(subjects: Sequence[Subject]) -> str:
    """A run a row: what its recipe says where they differ, its loss at the end, its quality and what it took."""
    settings = {subject.name: subject.settings for subject in subjects}
    keys = differing_keys(list(settings.values()))
    as_columns = len(keys) <= _MOST_COLUMNS
    measured, count, refused = _measured(subjects)
    measures = present(list(measured.values()))
    speeds = any(SECONDS.key in row.values for row in measured.values())
    losses = {subject.name: final_loss(subject.stages[-1]) for subject in subjects if subject.stages and subject.stages[-1].steps}
    losses = {name: value for name, value in losses.items() if isfinite(value)}
    comparable = not any(key.startswith(_LOSS_KEYS) for key in keys)
    differs = [_short(key, keys) for key in keys] if as_columns else ["What differs"]
    names = ["Run", *differs, "Optimizer steps", "Loss at the end", *(measure.title for measure in measures)]
    names += [*([SECONDS.title] if speeds else []), "Training time"]
    lines = []
    for subject in subjects:
        row = measured.get(subject.name)
        loss = losses.get(subject.name)
        least = comparable and len(losses) > 1 and loss is not None and loss == min(losses.values())
        best = ' class="best"' if least else ""
        cells = [f"<td>{escape(subject.name)}</td>"]
        if as_columns:
            cells += [f"<td>{escape(settings[subject.name].get(key, '–'))}</td>" for key in keys]
        else:
            cells.append(f'<td class="differs">{_differences(settings[subject.name], keys, list(settings.values()))}</td>')
        cells.append(f"<td>{_steps(subject)}</td>")
        cells.append(f"<td{best}>{'–' if loss is None else number_text(loss)}</td>")
        cells += [_cell(measure, row, list(measured.values())) for measure in measures]
        if speeds:
            cells.append(_cell(SECONDS, row, []))
        seconds = sum(stage.seconds for stage in subject.stages)
        cells.append(f"<td>{duration(seconds) if seconds else '–'}</td>")
        lines.append("".join(cells))
    shown, notes = table(heads(names), lines, style="compared"), _notes(subjects, measures, count, refused, comparable)
    return f"<h2>What differs, and what came of it</h2>{shown}{notes}"


def differing_keys(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Recipe keys whose values are not the same in all recipes; a recipe that could not be read does not count."""
    known = [each for each in settings if each]
    names = dict.fromkeys(key for each in known for key in each)
    keys = [key for key in names if len({each.get(key) for each in known}) > 1]
    same_data = DATA_SHA256 in names and DATA_SHA256 not in keys
    return [key for key in keys if key != DATA_SHA256 and not (same_data and key == "data.shards")]


def _measured(subjects: Sequence[Subject]) -> tuple[dict[str, Measured], int | None, str]:
    """Of each run the row at the step count that most of them were measured at (the most steps of such); why there is none."""
    rows = {subject.name: [row for row in own_rows(subject.measured) if has_quality(row)] for subject in subjects}
    everything = [row for found in rows.values() for row in found]
    if not everything:
        return {}, None, "Quality was not measured: `halfstep evaluate DIR --reference SHARDS` does it."
    if len(measured_alike(everything)) > 1:
        return {}, None, "Quality is not shown here: the runs were measured in different ways."
    counts = Counter(row.steps for row in everything)
    count = max(counts, key=lambda steps: (counts[steps], steps))
    return {name: row for name, found in rows.items() for row in found if row.steps == count}, count, ""


def _cell(measure: Measure, row: Measured | None, others: Sequence[Measured]) -> str:
    value = row.values.get(measure.key) if row else None
    values = [other.values[measure.key] for other in others if measure.key in other.values]
    shown = "–" if value is None else duration(value) if measure is SECONDS else measure.text(value)
    return f"<td{best_class(measure, value, values)}>{shown}</td>"


def _steps(subject: Subject) -> str:
    """Optimizer steps of all stages, and those that are still to come."""
    if len(subject.stages) == 1:
        return steps_done(subject.stages[0])
    done, wanted = sum(stage.done for stage in subject.stages), sum(stage.updates for stage in subject.stages)
    return "–" if not subject.stages else f"{done:,}" if done >= wanted else f"{done:,} of {wanted:,}"


def _differences(own: Mapping[str, str], keys: Sequence[str], everyone: Sequence[Mapping[str, str]]) -> str:
    """The values of one recipe that the fewest others share, first."""
    shared = {key: sum(other.get(key) == own.get(key) for other in everyone) for key in keys if key in own}
    chosen = sorted(shared, key=lambda key: shared[key])
    lines = [f"{escape(_short(key, keys))} = {escape(own[key])}" for key in chosen[:_MOST_LINES]]
    more = len(chosen) - _MOST_LINES
    return "<br>".join([*lines, *([f"and {more} more"] if more > 0 else [])]) or "–"


def _short(key: str, keys: Sequence[str]) -> str:
    """The last word of a key where that tells it apart."""
    word = key.rpartition(".")[2]
    return word.replace("_", " ") if sum(other.rpartition(".")[2] == word for other in keys) == 1 and word != "kind" else key


def _notes(subjects: Sequence[Subject], measures: Sequence[Measure], count: int | None, refused: str, comparable: bool) -> str:
    notes = ["Loss at the end: moving average over the last logged steps."]
    if any(len(subject.stages) > 1 for subject in subjects):
        notes.append("Of a chain: the last stage's.")
    if not comparable:
        notes.append("The losses do not mean the same where objective, noise or data differ: none is marked as the best.")
    if count is not None and measures:
        notes.append(f"Quality is that of {steps_text(count)}.")
    unfinished = [subject.name for subject in subjects if subject.stages and not subject.is_done]
    if unfinished:
        notes.append(f"Not at their end yet: {', '.join(unfinished)}.")
    text = escape(" ".join([*notes, *([refused] if refused else [])]))
    return f'<p class="soft">{_code(text)}</p>'


def _code(text: str) -> str:
    """What stands between backticks, as code."""
    pieces = text.split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
