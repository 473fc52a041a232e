"""Progress of what the command line does itself: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import final

_PLAIN_LINE_SECONDS = 5.0
_WORTH_A_LINE_SECONDS = 0.5
_SHOWN_RATE_SECONDS = 0.2

Show = Callable[[int, int | None], None]


@contextmanager
def pack_progress(title: str) -> Iterator[Show]:
    """A function (done, total or None where nobody knows it) that shows how far the work has come."""
    with pass_progress({"": title}) as show:
        yield lambda done, total: show("", done, total)


@contextmanager
def pass_progress(titles: dict[str, str]) -> Iterator[Callable[[str, int, int | None], None]]:
    """The same for work of several passes, (pass, done, total): each gets its own title, bar, rate and time left."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            tasks: dict[str, tuple[TaskID, Rate]] = {}

            def show(name: str, done: int, total: int | None) -> None:
                if name not in tasks:
                    tasks[name] = bar.add_task(titles[name], total=None, rate=""), Rate(time.monotonic(), done)
                task, rate = tasks[name]
                bar.update(task, completed=done, total=total, rate=rate.text(time.monotonic(), done))

            yield show
    else:
        shows: dict[str, Show] = {}

        def plain(name: str, done: int, total: int | None) -> None:
            if name not in shows:
                shows[name] = _plain(titles[name])
            shows[name](done, total)

        yield plain


@final
class Rate:
    """How fast work goes on from where it was found."""

    def __init__(self, started: float, already_done: int) -> None:
        self._started = started
        self._already_done = already_done

    def a_second(self, now: float, done: int) -> float:
        """What was done a second, without what an earlier attempt did."""
        return (done - self._already_done) / max(1e-9, now - self._started)

    def text(self, now: float, done: int) -> str:
        """The rate for people, "" while it says nothing."""
        if now - self._started < _SHOWN_RATE_SECONDS:
            return ""
        rate = self.a_second(now, done)
        return f"{rate:.0f} a second" if rate >= 10 else f"{rate:.2g} a second"

    def seconds_left(self, now: float, done: int, total: int | None) -> float | None:
        """None where nobody knows."""
        rate = self.a_second(now, done)
        return None if total is None or rate <= 0 else (total - done) / rate


def spoken_seconds(seconds: float) -> str:
    """A time to wait, such as `40 s`, `12 min` or `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def _plain(title: str) -> Show:
    started = last = time.monotonic()
    rate: Rate | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal last, rate
        now = time.monotonic()
        rate = rate or Rate(started, done)
        ends = done == total and now - started >= _WORTH_A_LINE_SECONDS
        if now - last >= _PLAIN_LINE_SECONDS or ends:
            last = now
            left = rate.seconds_left(now, done, total)
            words = [f"{title}: {done}" + ("" if total is None else f"/{total}"), rate.text(now, done)]
            words += [] if left is None or ends else [f"{spoken_seconds(left)} left"]
            sys.stderr.write(", ".join(word for word in words if word) + "\n")

    return show
