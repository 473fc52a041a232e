"""Status reads a run's folder and nothing else."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from launch.status import print_status, run_status


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 10 steps that was asked to stop after 4."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text("data: {shards: x}\ntrain: {steps: 10}\n")
    lines = [{"step": step, "loss": 0.5, "images_per_second": 100.0, "step_seconds": 2.0} for step in range(4)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "attempts.jsonl").write_text("{}\n{}\n")
    (run / "exit.json").write_text('{"code": 75, "reason": "asked to stop"}')
    (run / ".lock").touch()
    return run


def test_a_stopped_run_says_where_and_why(run_dir: Path) -> None:
    status = run_status(run_dir, ended=None)
    assert (status.state, status.step, status.total_steps, status.attempts) == ("stopped", 4, 10, 2)
    assert status.last_end == "75 asked to stop" and status.remaining_seconds is None


def test_a_run_whose_lock_is_held_is_running(run_dir: Path) -> None:
    descriptor = os.open(run_dir / ".lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        status = run_status(run_dir, ended=None)
    finally:
        os.close(descriptor)
    assert status.state == "running" and status.remaining_seconds == 12.0


def test_a_crashed_run_has_failed(run_dir: Path) -> None:
    (run_dir / "exit.json").write_text('{"code": 66, "reason": "NumericError: step 3"}')
    assert run_status(run_dir, ended=None).state == "failed"


def test_a_half_written_last_line_is_not_read(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    assert run_status(run_dir, ended=None).step == 4


def test_a_step_that_was_left_out_at_the_end_is_counted(run_dir: Path) -> None:
    """Steps 4 to 9 had bad numbers: they have no line, but the run is at its end."""
    for name in ("step_000004", "step_000010", "step_000012.partial"):
        (run_dir / "checkpoints" / name).mkdir(parents=True)
        (run_dir / "checkpoints" / name / "manifest.json").touch()
    (run_dir / "export").mkdir()
    (run_dir / "export" / "model_index.json").touch()
    assert (run_status(run_dir, ended=None).step, run_status(run_dir, ended=None).state) == (10, "done")


def test_json_names_what_others_rely_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status(run_dir, as_json=True) == 0
    fields = json.loads(capsys.readouterr().out)
    assert {"state", "step", "attempts", "job_ids"} <= fields.keys()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe\.yaml there"):
        print_status(tmp_path, as_json=False)
