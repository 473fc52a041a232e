"""Local ranks live and die together, and the launcher tells the truth about how."""

import json
from pathlib import Path

import pytest

from launch.cluster import ClusterConfig
from launch.demo import run_demo
from launch.local import Job, run_job
from launch.run_lock import is_locked, locked


def test_bad_input_of_a_job_ends_with_64(tmp_path: Path) -> None:
    assert run_job(Job("hash", tmp_path, {}), ClusterConfig(), ranks=1) == 64


def test_a_run_without_a_recipe_leaves_its_reason(tmp_path: Path) -> None:
    assert run_job(Job("train", tmp_path, {}), ClusterConfig(), ranks=1, run_dir=tmp_path) == 64
    record = json.loads((tmp_path / "exit.json").read_text())
    assert record["code"] == 64 and "recipe.yaml" in record["reason"]


def test_two_commands_never_share_a_run(tmp_path: Path) -> None:
    with locked(tmp_path):
        assert is_locked(tmp_path)
        with pytest.raises(ValueError, match="another process is running this run"), locked(tmp_path):
            pass
    assert not is_locked(tmp_path)


def test_ranks_that_cannot_divide_a_step_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 ranks cannot divide 2 micro-batches"):
        run_demo(tmp_path / "demo", ranks=3)
    assert not (tmp_path / "demo").exists()
