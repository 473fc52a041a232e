"""Curves as inline SVG, coloured by the page's own CSS variables, so that they follow light, dark and print."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import final

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 10, 30
_MOST_POINTS = 700


@final
@dataclass(frozen=True)
class Series:
    """One line of a plot; a value that is not finite leaves a gap, on a logarithmic axis also one that is not above 0."""

    label: str
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    colour: str
    """A CSS variable's name, such as --student."""


def smoothed(values: Sequence[float]) -> tuple[float, ...]:
    """Centred moving average over a fortieth of the values; values that are not finite do not count."""
    half = max(1, len(values) // 80)
    sums, counts = [0.0], [0]
    for value in values:
        finite = math.isfinite(value)
        sums.append(sums[-1] + (value if finite else 0.0))
        counts.append(counts[-1] + finite)
    averages = []
    for number in range(len(values)):
        first, last = max(0, number - half), min(len(values), number + half + 1)
        count = counts[last] - counts[first]
        averages.append((sums[last] - sums[first]) / count if count else math.nan)
    return tuple(averages)


def loss_plot(
    series: Sequence[Series], *, title: str, wide: bool = False, behind: Sequence[Series] = (), span: tuple[float, float] | None = None
) -> str:
    """Losses over optimizer steps on a logarithmic axis: each raw line pale, its moving average on top.

    wide: for a plot that has the page's width to itself; its style is shown on wide screens only. behind: lines that stand pale
    behind these, so that a plot of one run shows it among the others; they count for the axes. span: lowest and highest loss
    shown; None for those of the lines."""
    width, height = (760, 260) if wide else (360, 200)
    if not any(_is_drawable(value) for each in series for value in each.ys):
        return ""
    most = max(max(each.xs) for each in (*series, *behind) if each.xs)
    frame = _Frame((0.0, max(most, 1.0)), span or loss_span([*series, *behind]), width, height, log_x=False)
    lines = [f'<path class="behind" d="{frame.path(each.xs, smoothed(each.ys))}"/>' for each in behind]
    for each in series:
        if not behind:
            lines.append(f'<path class="raw" style="stroke:var({each.colour})" d="{frame.path(each.xs, each.ys)}"/>')
        lines.append(f'<path class="line" style="stroke:var({each.colour})" d="{frame.path(each.xs, smoothed(each.ys))}"/>')
    body = frame.grid_y() + frame.ticks_x(_round_ticks(most)) + "".join(lines)
    return _svg(width, height, f"{title}: loss over optimizer steps, logarithmic", body, style="plot wide" if wide else "plot")


def loss_span(series: Sequence[Series]) -> tuple[float, float]:
    """Lowest and highest loss of an axis: a first loss far above the rest would flatten the curves, so it follows the averages and
    the bulk of the raw values."""
    ordered = sorted(value for each in series for value in each.ys if _is_drawable(value))
    high = max([ordered[-1 - len(ordered) // 200], *(value for each in series for value in smoothed(each.ys) if _is_drawable(value))])
    return ordered[len(ordered) // 200] / 1.1, high * 1.1


def steps_plot(series: Sequence[Series], *, title: str, small: bool = False) -> str:
    """A number over sampling steps, these logarithmic, a dot for every row; the number too, where it spans a factor above 0."""
    width, height = (360, 210) if small else (460, 270)
    points = [(x, y) for each in series for x, y in zip(each.xs, each.ys, strict=True) if math.isfinite(y)]
    if not points:
        return ""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    log_y = low > 0 and high > 2 * low
    margin = 0.08 * (high - low) or max(abs(high), 1e-9) * 0.1
    span_y = (low / 1.3, high * 1.3) if log_y else (low - margin, high + margin)
    frame = _Frame((min(xs) / 1.25, max(xs) * 1.25), span_y, width, height, log_x=True, log_y=log_y)
    body = frame.grid_y() + frame.ticks_x(sorted(set(xs)))
    for each in series:
        body += f'<path class="line" style="stroke:var({each.colour})" d="{frame.path(each.xs, each.ys)}"/>'
        for x, y in zip(each.xs, each.ys, strict=True):
            if math.isfinite(y):
                note = f"{each.label}, {x:g} {'step' if x == 1 else 'steps'}: {y:.3g}"
                place = f'cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{3 if small else 4}"'
                body += f'<circle {place} style="fill:var({each.colour})"><title>{escape(note)}</title></circle>'
    return _svg(width, height, title, body)


def sparkline(values: Sequence[float]) -> str:
    """A line without axes, from 0 up, that shows whether a speed was steady."""
    width, height = 96, 20
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    top, count = max(finite) or 1.0, len(finite)
    chosen = range(0, count, max(1, count // width))
    points = " ".join(f"{number / (count - 1) * width:.1f},{height - 1 - finite[number] / top * (height - 2):.1f}" for number in chosen)
    return f'<svg class="spark" viewBox="0 0 {width} {height}" aria-hidden="true"><polyline points="{points}"/></svg>'


@final
@dataclass(frozen=True)
class _Frame:
    """A plot's axes, each logarithmic or straight."""

    span_x: tuple[float, float]
    span_y: tuple[float, float]
    width: int
    height: int
    log_x: bool
    log_y: bool = True

    def x(self, value: float) -> float:
        return _LEFT + _share(value, self.span_x, log=self.log_x) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.span_y
        share = _share(min(max(value, low), high), self.span_y, log=self.log_y)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)

    def path(self, xs: Sequence[float], ys: Sequence[float]) -> str:
        """An SVG path through the points, at most some hundred of them, broken where a value cannot be drawn."""
        every = max(1, len(xs) // _MOST_POINTS)
        commands, pen = [], "M"
        for number in [*range(0, len(xs) - 1, every), len(xs) - 1]:
            if _is_drawable(ys[number]) if self.log_y else math.isfinite(ys[number]):
                commands.append(f"{pen}{self.x(xs[number]):.1f} {self.y(ys[number]):.1f}")
                pen = "L"
            else:
                pen = "M"
        return "".join(commands)

    def grid_y(self) -> str:
        """Horizontal lines with their values."""
        parts = []
        for value in _log_ticks(*self.span_y) if self.log_y else _straight_ticks(*self.span_y):
            height = f"{self.y(value):.1f}"
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{height}" y2="{height}"/>')
            parts.append(f'<text class="tick end" x="{_LEFT - 6}" y="{height}" dy="0.32em">{number_text(value)}</text>')
        return "".join(parts)

    def ticks_x(self, values: Sequence[float]) -> str:
        """Values below the horizontal axis; one that would touch the value before it is left out."""
        base = self.height - _BOTTOM
        parts = [f'<line class="axis" x1="{_LEFT}" x2="{self.width - _RIGHT}" y1="{base}" y2="{base}"/>']
        free_from = -math.inf
        for value in values:
            place, text = self.x(value), f"{value:g}"
            if place - 4 * len(text) < free_from:
                continue
            free_from = place + 4 * len(text) + 4
            parts.append(f'<text class="tick middle" x="{place:.1f}" y="{base + 18}">{text}</text>')
        return "".join(parts)


def number_text(value: float) -> str:
    """A number of any size in three digits and few characters: 0.002, 3, 3e-5."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if not 0 < abs(value) < 1e-3:
        return f"{value:.3g}"
    digits, exponent = f"{value:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def _share(value: float, span: tuple[float, float], *, log: bool) -> float:
    """Where a value lies on an axis, from 0 to 1."""
    low, high = span
    return math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)


def _is_drawable(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _log_ticks(low: float, high: float) -> list[float]:
    """Between two and seven round values on a logarithmic axis, where it has that many."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps, fewest in (((1,), 3), ((1, 3), 3), ((1, 2, 5), 2), ((1, 1.5, 2, 3, 4, 5, 7), 2)):
        ticks = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(ticks) >= fewest:
            return ticks if len(ticks) <= 7 else ticks[:: -(-len(ticks) // 6)]
    return [low * (high / low) ** (number / 3) for number in range(4)]


def _straight_ticks(low: float, high: float) -> list[float]:
    """Three to six round values on a straight axis."""
    unit = 10.0 ** math.floor(math.log10(high - low))
    step = next(factor * unit for factor in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if (high - low) / (factor * unit) <= 6)
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _round_ticks(most: float) -> list[float]:
    """0 and up to five round values to `most`."""
    if most <= 0:
        return [0.0]
    unit = 10.0 ** math.floor(math.log10(most))
    step = next(factor * unit for factor in (0.2, 0.5, 1.0, 2.0) if most / (factor * unit) <= 5)
    return [number * step for number in range(int(most / step + 1e-9) + 1)]


def _svg(width: int, height: int, label: str, body: str, *, style: str = "plot") -> str:
    return f'<svg class="{style}" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label, quote=True)}">{body}</svg>'
