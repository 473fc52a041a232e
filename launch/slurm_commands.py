"""Slurm's own commands, and what they say of a job."""

import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, final

_TIMEOUT_SECONDS = 60.0

JobState = Literal["queued", "held", "running", "ended"]

_QUEUED = frozenset({"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
_RUNNING = frozenset({"RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING"})


@final
@dataclass(frozen=True)
class SlurmJob:
    """A job as the controller sees it."""

    job_id: str
    state: JobState
    word: str
    """Slurm's own word, such as PENDING or PREEMPTED."""
    reason: str
    """Why it waits; empty where Slurm says nothing."""
    nodes: str
    """The node list, such as n[1-2]; empty for a job that has none."""
    restarts: int
    over_limit: bool
    """Whether it has used up its time limit."""


def slurm(words: Sequence[str], *, stdin: str | None = None) -> str:
    """Run one of Slurm's commands; returns what it prints.

    Raises: RuntimeError with Slurm's own words; ValueError where Slurm is not installed."""
    try:
        done = subprocess.run(words, input=stdin, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except FileNotFoundError:
        raise ValueError(f"{words[0]}: no such command; Slurm's commands are not on this machine (halfstep doctor)") from None
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{words[0]}: no answer within {_TIMEOUT_SECONDS:g} s; is slurmctld running? (halfstep doctor)") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def find_job(job_id: str) -> SlurmJob | None:
    """The job; None where the controller does not know it (any more).

    Raises: RuntimeError where Slurm does not answer."""
    try:
        text = slurm(["scontrol", "--oneliner", "show", "job", job_id])
    except RuntimeError as error:
        # of an array's element the second, on stdout, where other elements are still known
        if "Invalid job id" in str(error) or str(error).endswith("not found"):
            return None
        raise
    lines = [parse_job(line) for line in text.splitlines() if line.startswith("JobId=")]
    return lines[0] if lines else None


def parse_job(line: str) -> SlurmJob:
    """A line of `scontrol --oneliner show job`."""
    fields = {name: value for name, equals, value in (word.partition("=") for word in line.split()) if equals}
    words = fields.get("JobState", "UNKNOWN").split(",")
    reason = fields.get("Reason", "None")
    return SlurmJob(
        job_id=_element(fields),
        state=_state(words[0], reason),
        word=words[0],
        reason="" if reason == "None" else reason,
        nodes="" if fields.get("NodeList") in (None, "(null)") else fields["NodeList"],
        restarts=int(fields.get("Restarts", "0")),
        over_limit=_seconds(fields.get("RunTime", "")) >= (_seconds(fields.get("TimeLimit", "")) or math.inf),
    )


def _seconds(text: str) -> float:
    """Slurm's [D-]HH:MM:SS in seconds; 0 for a word, such as UNLIMITED."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdecimal() for part in parts):
        return 0.0
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return seconds + 86400.0 * int(days or 0)


def _element(fields: Mapping[str, str]) -> str:
    if "ArrayJobId" in fields and fields.get("ArrayTaskId", "").isdecimal():
        return f"{fields['ArrayJobId']}_{fields['ArrayTaskId']}"
    return fields["JobId"]


def _state(word: str, reason: str) -> JobState:
    if word in _QUEUED:
        return "held" if "held" in reason.lower() or word in ("SPECIAL_EXIT", "REQUEUE_HOLD") else "queued"
    return "running" if word in _RUNNING else "ended"
