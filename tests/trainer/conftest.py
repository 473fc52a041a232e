"""Runs on disk without any training, and chains of them."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import written_runs

IMAGE_SIZE = written_runs.IMAGE_SIZE

WriteRun = Callable[..., Path]


@pytest.fixture
def write_run() -> WriteRun:
    """A function that writes the RUN_DIR of a teacher, or with `student_steps` of a student, after 7 steps; returns its path."""
    return written_runs.write_run


@pytest.fixture
def write_chain(tmp_path: Path) -> Callable[[dict[int, Path]], Path]:
    """A function that writes chain.json over runs inside tmp_path, given by step count, the teacher's first."""

    def write(runs: dict[int, Path]) -> Path:
        stages = [{"name": run.name, "steps": steps, "run_dir": str(run.relative_to(tmp_path))} for steps, run in runs.items()]
        (tmp_path / "chain.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
        return tmp_path

    return write
