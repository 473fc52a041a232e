"""`--profile`: a few steps of rank 0 under torch.profiler, as a trace for chrome://tracing and a table of where they went."""

import logging
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import final

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from data_shards import ranks
from data_shards.files import replace_file
from trainer.spans import PREFIX

logger = logging.getLogger(__name__)

FOLDER = "profile"
"""In RUN_DIR."""
_LEFT_OUT, _WARM, _STEPS = 2, 1, 5
"""Steps that are not watched (the first ones compile and fill caches), that only warm the profiler up, and that are watched."""
_STEP = "ProfilerStep"
_REST = "everything else"
_OPERATORS = 20


@final
@dataclass(frozen=True)
class Span:
    """A named stretch of the main thread's time."""

    name: str
    start: float
    """In microseconds, as `end`; spans lie within one another or apart."""
    end: float


@final
@dataclass(frozen=True)
class Launch:
    """Work that was given to a device, by any thread of the process."""

    at: float
    """When, in microseconds on the spans' clock."""
    microseconds: float
    """That the device spent on it."""


@final
@dataclass(frozen=True)
class Part:
    """What of the watched steps went into one span without those inside it, in microseconds."""

    name: str
    host: float
    device: float


def parts_of(spans: Iterable[Span], launches: Iterable[Launch]) -> list[Part]:
    """Time by innermost span, longest first; what the device did counts for the span that was open when it was asked to."""
    edges = sorted([(span.start, 1, -span.end, span.name) for span in spans] + [(span.end, 0, 0.0, span.name) for span in spans])
    open_, starts, names = list[str](), list[float](), list[str | None]()
    for at, opens, _, name in edges:
        if opens:
            open_.append(name)
        else:
            open_.remove(name)
        starts.append(at)
        names.append(open_[-1] if open_ else None)
    host, device = defaultdict[str, float](float), defaultdict[str, float](float)
    for (start, end), name in zip(pairwise(starts), names, strict=False):
        if name is not None:
            host[name] += end - start
    for launch in launches:
        place = bisect_right(starts, launch.at) - 1
        if place >= 0 and (name := names[place]) is not None:
            device[name] += launch.microseconds
    return sorted((Part(name, host[name], device[name]) for name in host), key=lambda part: -part.host)


def table(parts: Sequence[Part], *, steps: int) -> str:
    """The parts as lines for people: milliseconds and shares of one step, those of a device only where there is one."""
    on_device = any(part.device for part in parts)
    heads = ("part of a step", "ms", "share", "device ms", "share")[: 5 if on_device else 3]
    rows: list[tuple[str, ...]] = [heads]
    host, device = sum(part.host for part in parts), sum(part.device for part in parts)
    for part in [*parts, Part("the whole step", host, device)]:
        row = (part.name, _milliseconds(part.host / steps), _share(part.host, host))
        rows.append((*row, _milliseconds(part.device / steps), _share(part.device, device)) if on_device else row)
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]) for row in rows
    )


@final
class Profile:
    """The profile of one attempt: it begins by itself after some steps, and ends by itself."""

    def __init__(self, run_dir: Path, *, start_step: int) -> None:
        self.run_dir, self.first_step = run_dir, start_step + _LEFT_OUT + _WARM
        self.watched = -_LEFT_OUT - _WARM
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        plan = schedule(wait=_LEFT_OUT, warmup=_WARM, active=_STEPS, repeat=1)
        self.profiler: profile | None = profile(activities=activities, schedule=plan, on_trace_ready=self._write)
        self.profiler.start()

    def stepped(self) -> None:
        """Say that a step is over."""
        if profiler := self.profiler:
            self.watched += 1
            profiler.step()
            if self.profiler is None:  # it has just written what it saw
                profiler.stop()

    def close(self) -> None:
        """Write what was watched, where the attempt ended before the last step that was to be."""
        if self.profiler:
            self.profiler.stop()
        if self.watched <= 0:
            logger.warning("--profile: the attempt ended before step %d was over, the first to be watched", self.first_step)

    def _write(self, profiler: profile) -> None:
        self.profiler = None
        if self.watched <= 0:
            return
        events = profiler.events() or []
        host = [event for event in events if event.device_type == DeviceType.CPU]
        steps = [Span(_REST, event.time_range.start, event.time_range.end) for event in host if event.name.startswith(_STEP)]
        steps = sorted(steps, key=lambda span: span.start)[: self.watched]  # one that was not to its end would be no measure
        host = [event for event in host if event.time_range.start < steps[-1].end]
        named = [event for event in host if event.name.startswith(PREFIX)]
        spans = [Span(event.name.removeprefix(PREFIX), event.time_range.start, event.time_range.end) for event in named]
        launches = [Launch(event.time_range.start, kernel.duration) for event in host for kernel in event.kernels]
        where = f"{len(steps)} steps from step {self.first_step} on, rank 0 of {ranks.world_size()}, {ranks.device()}"
        by_part = table(parts_of([*steps, *spans], launches), steps=len(steps))
        sort_by = "self_device_time_total" if launches else "self_cpu_time_total"
        operators = profiler.key_averages().table(sort_by=sort_by, row_limit=_OPERATORS, max_name_column_width=48)
        folder = self.run_dir / FOLDER
        folder.mkdir(exist_ok=True)
        stem = f"step_{self.first_step:06d}"
        profiler.export_chrome_trace(str(folder / f"{stem}.trace.json.gz"))
        replace_file(folder / f"{stem}.txt", f"{where}\n\n{by_part}\n\n{operators}\n")
        logger.info(
            "profile of %s:\n%s\nthis table, operators and a trace for chrome://tracing or ui.perfetto.dev: %s", where, by_part, folder
        )


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.2f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}%" if whole else ""
