"""Pieces made by several processes: progress row by row, an end that comes soon, and no process left over after a kill."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from multiprocessing.sharedctypes import Synchronized
from typing import final

from data_shards.packing.pieces import NAMED_ROWS, BadRowsError, PieceJob, make_piece
from data_shards.sources.rows import Part

REPORT_SECONDS = 0.25
_AHEAD = 2  # parts a worker has waiting


@final
class _StoppedError(Exception):
    """Another worker failed: what this one makes is of no use any more."""


def make_pieces(job: PieceJob, parts: Sequence[tuple[int, Part]], workers: int, report: Callable[[int], None]) -> None:
    """Makes the numbered pieces; report: called with the rows done so far.

    Raises: BadRowsError; ValueError or OSError as make_piece; RuntimeError if a worker process dies.
    """
    if workers == 1 or len(parts) < 2:
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            report(done)

        for number, part in parts:
            make_piece(job, number, part, tick)
        return
    # spawn: a caller may hold threads and locks (torch, rich) that do not survive a fork
    context = multiprocessing.get_context("spawn")
    rows, stop = context.Value("q", 0), context.Value("b", 0)
    pool = ProcessPoolExecutor(min(workers, len(parts)), mp_context=context, initializer=_start, initargs=(job, rows, stop))
    try:
        _run(pool, parts, workers, rows, report)
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that packs was killed, often for want of memory; run the same command again to go on, with fewer --workers"
        ) from None
    finally:
        stop.value = 1
        pool.shutdown(cancel_futures=True)


def _run(
    pool: ProcessPoolExecutor, parts: Sequence[tuple[int, Part]], workers: int, rows: "Synchronized[int]", report: Callable[[int], None]
) -> None:
    """Hands out the parts in order and waits; the first failure ends it."""
    todo: Iterator[tuple[int, Part]] = iter(parts)
    running: set[Future[None]] = set()
    while True:
        while len(running) < _AHEAD * workers and (task := next(todo, None)) is not None:
            running.add(pool.submit(_make, *task))
        if not running:
            return
        finished, running = wait(running, timeout=REPORT_SECONDS, return_when=FIRST_COMPLETED)
        report(rows.value)
        bad = [error for future in finished if isinstance(error := future.exception(), BadRowsError)]
        if bad:
            raise BadRowsError([name for error in bad for name in error.named][:NAMED_ROWS], sum(error.count for error in bad))
        for future in finished:
            future.result()


_made_here: tuple[PieceJob, "Synchronized[int]", "Synchronized[int]"]


def _start(job: PieceJob, rows: "Synchronized[int]", stop: "Synchronized[int]") -> None:
    """In a worker: what all its pieces share, sent once."""
    global _made_here
    _made_here = (job, rows, stop)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent says when to stop
    threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """A killed parent tells nobody: without this its workers would wait for work, and hold the folder's files, for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    wait_for([parent.sentinel])
    os._exit(1)


def _make(number: int, part: Part) -> None:
    job, rows, stop = _made_here

    def tick() -> None:
        with rows.get_lock():
            rows.value += 1
        if stop.value:
            raise _StoppedError

    make_piece(job, number, part, tick)
