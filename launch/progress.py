"""Progress of what the command line does itself: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_PLAIN_LINE_SECONDS = 5.0
_WORTH_A_LINE_SECONDS = 0.5


@contextmanager
def pack_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows how far the work has come."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        yield _plain(title)


def _plain(title: str) -> Callable[[int, int], None]:
    started = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        ends = done == total and now - started >= _WORTH_A_LINE_SECONDS
        if now - last >= _PLAIN_LINE_SECONDS or ends:
            last = now
            sys.stderr.write(f"{title}: {done}/{total}, {done / max(1e-9, now - started):.0f} a second\n")

    return show
