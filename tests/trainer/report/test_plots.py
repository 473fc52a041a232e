"""Curves as SVG: well formed, inside their frame, with gaps where there is no value."""

import math
import re
from xml.etree import ElementTree

import pytest

from trainer.report.plots import Series, loss_plot, number_text, smoothed, sparkline, steps_plot


def points(svg: str, kind: str) -> list[tuple[float, float]]:
    paths = "".join(path.get("d", "") for path in ElementTree.fromstring(svg).iter("path") if path.get("class") == kind)
    return [(float(x), float(y)) for x, y in re.findall(r"[ML]([-\d.]+) ([-\d.]+)", paths)]


def test_a_moving_average_keeps_a_constant_and_bridges_gaps() -> None:
    assert smoothed([2.0] * 5) == (2.0,) * 5
    assert smoothed([1.0, math.nan, 3.0])[1] == 2.0
    assert len(smoothed([])) == 0


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5, 0.5], [1e-7, 1e-2, 10.0], [3.0, math.nan, 2.0, 0.0, 1.0], [1.0 / (n + 1) for n in range(5000)]]
)
def test_losses_stay_inside_the_frame(values: list[float]) -> None:
    svg = loss_plot([Series("run", tuple(float(n) for n in range(len(values))), tuple(values), "--student")], title="a < b")
    for kind in ("raw", "line"):
        drawn = points(svg, kind)
        assert drawn and len(drawn) <= 1500
        assert all(46 <= x <= 348 and 10 <= y <= 170 for x, y in drawn)


def test_falling_losses_fall() -> None:
    drawn = points(loss_plot([Series("run", (0.0, 1.0, 2.0), (1.0, 0.1, 0.01), "--student")], title="t"), "raw")
    assert [y for _, y in drawn] == sorted(y for _, y in drawn)


def test_nothing_to_draw_is_no_plot() -> None:
    assert loss_plot([Series("run", (), (), "--student")], title="t") == ""
    assert loss_plot([Series("run", (0.0,), (math.nan,), "--student")], title="t") == ""
    assert steps_plot([], title="t") == ""
    assert sparkline([1.0]) == ""


def test_every_distance_has_a_dot_with_its_number() -> None:
    svg = steps_plot([Series("student", (1.0, 8.0), (7.25, 2.5), "--student")], title="t")
    notes = [title.text for title in ElementTree.fromstring(svg).iter("title")]
    assert notes == ["student, 1 step: 7.25", "student, 8 steps: 2.5"]


def test_numbers_are_short() -> None:
    assert [number_text(value) for value in (0.0, 0.00003, 0.002, 1.5, 1234.0)] == ["0", "3e-5", "0.002", "1.5", "1,234"]


@pytest.mark.parametrize("values", [(-0.5, 2.0), (90.0, 95.0), (3.0, 3.0), (1e-3, 10.0), (0.0, 0.0)])
def test_numbers_of_any_sign_and_spread_stay_inside_the_frame(values: tuple[float, ...]) -> None:
    svg = steps_plot([Series("kid", (1.0, 8.0), values, "--student")], title="t", small=True)
    drawn = points(svg, "line")
    assert len(drawn) == 2 and all(46 <= x <= 348 and 10 <= y <= 180 for x, y in drawn)
    assert [text.text for text in ElementTree.fromstring(svg).iter("text") if text.get("class") == "tick end"]


def test_the_others_stand_pale_behind_one_run_on_the_axes_of_all() -> None:
    low, high = (Series(name, (0.0, 1.0), (value, value), "--student") for name, value in (("a", 0.1), ("b", 10.0)))
    svg = loss_plot([low], title="t", behind=[high])
    assert len(points(svg, "behind")) == 2 and len(points(svg, "line")) == 2 and not points(svg, "raw")
    assert points(svg, "behind")[0][1] < points(svg, "line")[0][1]
