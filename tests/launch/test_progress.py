"""Progress on a plain log: done, total, rate and time left, and of a resumed pack only what is done now counts as speed."""

import pytest

from launch import progress
from launch.progress import Rate, pack_progress, pass_progress, spoken_seconds


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_every_few_seconds_and_one_at_the_end(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pack_progress("packing") as show:
        for second in range(13):
            clock.now = 100.0 + second
            show(20 * second, 240)
    assert capsys.readouterr().err.splitlines() == [
        "packing: 100/240, 20 a second, 7 s left",
        "packing: 200/240, 20 a second, 2 s left",
        "packing: 240/240, 20 a second",
    ]


def test_what_an_earlier_attempt_did_is_no_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pack_progress("packing") as show:
        show(9000, 10_000)
        clock.now += 10
        show(9005, 10_000)
    assert capsys.readouterr().err == "packing: 9005/10000, 0.5 a second, 33 min left\n"


def test_passes_have_titles_and_times_of_their_own_and_totals_may_be_unknown(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pass_progress({"reading": "packing rows", "writing": "writing the shards"}) as show:
        show("reading", 0, None)
        clock.now += 5
        show("reading", 100, None)
        show("writing", 0, 100)
        clock.now += 1
        show("writing", 100, 100)
    assert capsys.readouterr().err.splitlines() == ["packing rows: 100, 20 a second", "writing the shards: 100/100, 100 a second"]


def test_short_work_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with pack_progress("packing") as show:
        show(0, 5)
        clock.now += 0.1
        show(5, 5)
    assert capsys.readouterr().err == ""


def test_times_are_spoken() -> None:
    assert [spoken_seconds(seconds) for seconds in (3, 89, 100, 5000, 12_600)] == ["3 s", "89 s", "2 min", "83 min", "3.5 h"]
    assert Rate(0, 5).seconds_left(10, 5, 100) is None
