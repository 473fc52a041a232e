"""Where ranks and jobs write what they say, and how it is shown."""

import codecs
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from launch.submitted import submissions

_LOOK_SECONDS = 0.5
_LEFT_SECONDS = 5.0
"""How long a job's first output may take to appear after its end, on a network file system."""


def rank_log(run_dir: Path, rank: int) -> int:
    """The open log of a rank other than 0, which keeps one of its own."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    return os.open(logs / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def show_log(run_dir: Path, *, rank: int | None, lines: int, follow: bool) -> int:
    """Write the end of a run's log to stdout: a rank's, or what its job or its rank 0 has said.

    follow: go on until the run has ended. Raises: ValueError listing the logs there are."""
    from launch.queued import is_over, is_running, look

    jobs = submissions(run_dir) if follow and rank is None else []
    own = look(run_dir, jobs[-1]) if jobs else None
    to_come = own if own and own.state in ("queued", "running") else None  # not an older job's output is to be followed
    path = run_dir / to_come.submission.output if to_come else log_path(run_dir, rank)
    if to_come and not path.exists():
        why = f" ({to_come.why})" if to_come.why else ""
        sys.stderr.write(f"job {to_come.submission.job_id} is {to_come.state}{why}; its output comes here\n")
    content = path.read_bytes() if path.exists() else b""
    sys.stdout.write(b"".join(content.splitlines(keepends=True)[-lines:]).decode(errors="replace"))
    sys.stdout.flush()
    if not content and not follow:
        sys.stderr.write(f"{path}: empty; a local run tells its progress to its terminal, and to halfstep status {run_dir}\n")
    if follow:
        tail(path, lambda: is_over(run_dir, own.submission) if own else not is_running(run_dir), position=len(content))
    return 0


def log_path(run_dir: Path, rank: int | None) -> Path:
    """The log of a rank; without one the output of the newest job, or rank 0's log where no job was queued.

    Raises: ValueError listing the logs there are."""
    jobs = [run_dir / job.output for job in reversed(submissions(run_dir))]
    wanted = [run_dir / "logs" / f"rank_{rank or 0}.log"] if rank is not None or not jobs else jobs
    found = next((path for path in wanted if path.exists()), None)
    if found is None:
        from launch.queued import folders

        below = [str(folder) for folder in folders(run_dir) if submissions(folder) or (folder / "logs").exists()]
        if below and str(run_dir) not in below:
            raise ValueError(f"{run_dir}: its runs have logs of their own; give one of {', '.join(below)}")
        there = sorted(path.name for path in (run_dir / "logs").glob("rank_*.log"))
        raise ValueError(f"{wanted[0]}: no such log yet; {run_dir / 'logs'} has {', '.join(there) or 'none'} (halfstep status {run_dir})")
    return found


def tail(path: Path, is_over: Callable[[], bool], *, position: int = 0) -> None:
    """Write a growing file to stdout, from a position on, until it is over and nothing more comes."""
    over_since = None
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a letter may be half written
    while True:
        over = is_over()
        if path.exists():
            with open(path, "rb") as file:
                file.seek(position)
                text = file.read()
            position += len(text)
            sys.stdout.write(decoder.decode(text))
            sys.stdout.flush()
            if text:
                continue
        if over:
            over_since = over_since or time.monotonic()
            if path.exists() or time.monotonic() - over_since > _LEFT_SECONDS:
                return
        time.sleep(_LOOK_SECONDS)
