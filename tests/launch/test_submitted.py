"""The jobs queued for a run are written down before anything else is done with them."""

import stat
from pathlib import Path

import pytest

from launch.submitted import Submission, record_submission, submissions

FIRST = Submission("slurm", "17", "job/slurm_17.log", submitted_at="2026-01-31T12:00:00Z")
SECOND = Submission("ray", "raysubmit_x", "job/ray.log", address="http://head:8265")


def test_a_run_without_jobs_has_none(tmp_path: Path) -> None:
    assert submissions(tmp_path) == []


def test_jobs_come_back_equal_and_in_order(tmp_path: Path) -> None:
    for submission in (FIRST, SECOND, FIRST):
        record_submission(tmp_path, submission)
    assert submissions(tmp_path) == [FIRST, SECOND, FIRST]
    assert (tmp_path / "job" / "submitted.jsonl").read_text().splitlines()[0] == (
        '{"launcher": "slurm", "job_id": "17", "output": "job/slurm_17.log", "address": null, "submitted_at": "2026-01-31T12:00:00Z"}'
    )


def test_the_moment_is_in_universal_time() -> None:
    assert SECOND.submitted_at.endswith("Z") and len(SECOND.submitted_at) == len(FIRST.submitted_at)


def test_the_folder_of_jobs_is_its_owners_alone(tmp_path: Path) -> None:
    record_submission(tmp_path, FIRST)
    assert stat.S_IMODE((tmp_path / "job").stat().st_mode) == 0o700


@pytest.mark.parametrize("line", ["{", "[]", '{"launcher": "slurm"}', '{"launcher": "slurm", "job_id": "1", "output": "x", "more": 1}', ""])
def test_a_damaged_record_names_its_file(line: str, tmp_path: Path) -> None:
    record_submission(tmp_path, FIRST)
    path = tmp_path / "job" / "submitted.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=rf"^{path}: cannot be read: .*; remove the line that is not JSON"):
        submissions(tmp_path)
