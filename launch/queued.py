"""Runs that wait or run as jobs of a queue: whether they do, letting held ones go on, following and stopping them."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import final

from launch.ends import read_end
from launch.logs import tail
from launch.run_lock import is_locked
from launch.slurm_commands import JobState, find_job, slurm
from launch.submitted import Submission, submissions
from launch.sweep import is_sweep, sweep_runs
from trainer.chain import read_chain
from trainer.exit_codes import CRASH, DONE
from trainer.lease import may_be_held
from trainer.stop import request_stop

_LOOK_SECONDS = 1.0


@final
@dataclass(frozen=True)
class Queued:
    """A job of a run, and its place in the queue."""

    run_dir: Path
    submission: Submission
    state: JobState
    why: str
    """Why it waits, or where it runs."""


def alive(path: Path) -> list[Queued]:
    """Jobs of a run, or of a chain and its stages, that wait or run; the newest submission of each folder counts.

    Raises: RuntimeError, ValueError where the queue cannot be asked."""
    found = []
    for run_dir in folders(path):
        jobs = submissions(run_dir)
        if jobs and (queued := look(run_dir, jobs[-1])) and queued.state != "ended":
            found.append(queued)
    return found


def look(run_dir: Path, submission: Submission) -> Queued | None:
    """A job's place in its queue; None where the queue does not know it any more."""
    match submission.launcher:
        case "slurm":
            job = find_job(submission.job_id)
            return job and Queued(run_dir, submission, job.state, f"on {job.nodes}" if job.nodes and job.state == "running" else job.reason)
        case "ray":
            from launch.ray_jobs import job_state

            state = job_state(submission)
            return state and Queued(run_dir, submission, state, "")


def folders(path: Path) -> Iterator[Path]:
    """The folder itself, of a chain each stage that it trains, and of a sweep each run, stages and all."""
    yield path
    if is_sweep(path):
        for run_dir in sweep_runs(path):
            yield from folders(run_dir)
    if (path / "chain.json").exists():
        yield from (stage.run_dir for stage in read_chain(path) if stage.trained_here)


def is_over(run_dir: Path, submission: Submission) -> bool:
    """Whether a job has ended, or waits for a person."""
    job = look(run_dir, submission)
    return job is None or job.state in ("ended", "held")


def let_go_on(path: Path) -> bool:
    """Whether the run waits or runs as a job already, which is said on the terminal; one that is held is released."""
    jobs = alive(path)
    for job in jobs:
        if job.state == "held":
            (job.run_dir / "job" / "restarts.json").unlink(missing_ok=True)  # a person has looked at it: counting starts anew
            slurm(["scontrol", "release", job.submission.job_id])
            sys.stderr.write(f"{job.run_dir}: job {job.submission.job_id} was held and is released; nothing else is submitted\n")
        else:
            why = f" ({job.why})" if job.why else ""
            sys.stderr.write(f"{job.run_dir}: job {job.submission.job_id} is {job.state}{why} already; nothing is submitted\n")
    return bool(jobs)


def follow(path: Path) -> int:
    """Show the output of a run's jobs, one after the other, until the last one has ended. Ctrl-C leaves the jobs running.

    Returns the run's exit code; of a sweep that of the first run that failed."""
    code = DONE
    try:
        for run_dir in folders(path):
            jobs = submissions(run_dir)
            if jobs and (code == DONE or is_sweep(path)):  # a chain's later stages leave the queue when one fails
                _follow_job(run_dir, jobs[-1])
                code = code or _exit_code(run_dir, jobs[-1])
    except KeyboardInterrupt:
        sys.stderr.write(f"\nno longer following; the run goes on. halfstep logs {path} --follow shows it again, halfstep stop ends it\n")
    return code


def is_running(path: Path) -> bool:
    """Whether a run, or a stage or run below it, runs now or waits in a queue."""
    return any(is_locked(folder) for folder in folders(path)) or bool(alive(path))


def stop(path: Path, *, wait: bool) -> int:
    """End a run: jobs that have not started leave the queue, ranks that run commit a checkpoint and end.

    wait: until they have. Raises: RuntimeError, ValueError where the queue cannot be asked."""
    jobs = {job.run_dir: job for job in alive(path)}
    running = []
    for folder in folders(path):
        job = jobs.get(folder)
        if job and job.state in ("queued", "held"):
            _leave_queue(job)
        elif job or is_locked(folder) or may_be_held(folder):
            request_stop(folder)
            running.append(folder)
    if not running:
        chain = (
            f"; a stage of a chain that runs as one is stopped by halfstep stop {path.parent}"
            if (path.parent / "chain.json").exists()
            else ""
        )
        sys.stderr.write(f"{path}: {'nothing of it was running' if jobs else 'is not running'}{chain}\n")
        return DONE
    sys.stderr.write(f"{', '.join(map(str, running))}: told to commit a checkpoint and end; the same command goes on from there\n")
    while wait and is_running(path):
        time.sleep(_LOOK_SECONDS)
    return DONE


def _leave_queue(job: Queued) -> None:
    match job.submission.launcher:
        case "slurm":
            slurm(["scancel", job.submission.job_id])
        case "ray":
            from launch.ray_jobs import stop_job

            stop_job(job.submission)
    sys.stderr.write(f"{job.run_dir}: job {job.submission.job_id} was {job.state} and is cancelled\n")


def _follow_job(run_dir: Path, submission: Submission) -> None:
    output = run_dir / submission.output
    tail(output, lambda: is_over(run_dir, submission))
    if submission.launcher == "ray" and not output.exists():  # its driver did not start: Ray itself says why
        from launch.ray_jobs import job_log

        sys.stdout.write(job_log(submission) or "")


def _exit_code(run_dir: Path, submission: Submission) -> int:
    end = read_end(run_dir)
    if end is None:
        sys.stderr.write(f"{run_dir}: job {submission.job_id} has not said how it ended: cancelled or held (halfstep status {run_dir})\n")
    return end.code if end else CRASH
