"""Where ranks and jobs write what they say, and how it is shown."""

import os
from pathlib import Path


def rank_log(run_dir: Path, rank: int) -> int:
    """The open log of a rank other than 0, which keeps one of its own."""
    logs = run_dir / "logs"
    logs.mkdir(exist_ok=True)
    return os.open(logs / f"rank_{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
