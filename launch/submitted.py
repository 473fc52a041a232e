"""The jobs that were queued for a run: RUN_DIR/job/submitted.jsonl."""

import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, final


@final
@dataclass(frozen=True)
class Submission:
    """One job in a queue."""

    launcher: Literal["slurm", "ray"]
    job_id: str
    """Of an element of an array, ARRAY_INDEX as Slurm writes it."""
    output: str
    """Where its output goes: a path relative to RUN_DIR."""
    address: str | None = None
    """Of the Ray cluster; null for Slurm, which SLURM_CONF finds."""
    submitted_at: str = field(default_factory=lambda: time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def record_submission(run_dir: Path, submission: Submission) -> None:
    """Add a job, durably: one that is not recorded would be queued twice."""
    path = _path(run_dir)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(submission)) + "\n")
        file.flush()
        os.fsync(file.fileno())


def submissions(run_dir: Path) -> list[Submission]:
    """All jobs of a run, oldest first.

    Raises: ValueError naming the file if it holds something else."""
    path = _path(run_dir)
    if not path.exists():
        return []
    try:
        return [Submission(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: cannot be read: {error}; remove the line that is not JSON") from error


def _path(run_dir: Path) -> Path:
    return run_dir / "job" / "submitted.jsonl"
