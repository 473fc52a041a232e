"""A local run comes back by itself as often as its cluster file allows, and stays down when a person wants it down."""

import json
import os
import signal
from pathlib import Path

import pytest

from tests.distributed.runs import curves, endless, rank_pids, run, started, wait_until
from trainer.hash import hash_run
from trainer.stop import request_stop

pytestmark = pytest.mark.distributed


def _ends(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "job" / "ends.jsonl").read_text().splitlines()]


def _has_checkpoint(run_dir: Path) -> bool:
    return any(run_dir.glob("**/checkpoints/step_??????/manifest.json"))


def test_a_chain_whose_rank_was_killed_comes_back_by_itself_and_changes_no_bit(two_ranks: Path, tmp_path: Path) -> None:
    run_dir, terminal = tmp_path / "run", tmp_path / "terminal"
    overrides = ("cluster.max_restarts=1",)
    with open(terminal, "wb") as stderr, started("distill", run_dir, ranks=2, overrides=overrides, stderr=stderr) as process:
        assert wait_until(lambda: _has_checkpoint(run_dir), process), terminal.read_text()
        os.kill(rank_pids(process.pid)[1], signal.SIGKILL)
        assert process.wait(180) == 0, terminal.read_text()
    assert curves(run_dir) == curves(two_ranks)
    assert hash_run(run_dir) == hash_run(two_ranks)
    assert [(end["code"], end["decision"]) for end in _ends(run_dir)] == [(70, "again"), (0, "done")]
    assert "starting again: rank 1 was killed by SIGKILL (by the kernel, if memory ran out: see dmesg); goes on from step " in (
        terminal.read_text()
    )


def test_a_run_that_crashes_at_once_is_started_as_often_as_allowed(tmp_path: Path) -> None:
    # An interpreter that does not find its own library ends with 1 before anything of ours runs.
    overrides = (*endless(tmp_path / "shards"), "cluster.max_restarts=2", "cluster.environment.PYTHONHOME=/nowhere")
    finished = run("train", tmp_path / "run", ranks=2, overrides=overrides)
    assert finished.returncode == 1, finished.stderr
    ends = _ends(tmp_path / "run")
    assert [(end["code"], end["decision"]) for end in ends] == [(1, "again"), (1, "again"), (1, "stop")]
    assert str(ends[-1]["why"]).endswith("3 attempts in a row came no further than step 0 (cluster.max_restarts=2)")
    assert finished.stderr.count("starting again: ") == 2


def test_without_restarts_a_lost_rank_ends_the_run_also_when_it_came_further(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started("train", run_dir, ranks=2, overrides=endless(tmp_path / "shards")) as process:
        assert wait_until(lambda: _has_checkpoint(run_dir), process)
        os.kill(rank_pids(process.pid)[1], signal.SIGKILL)
        assert process.wait(60) == 70
    assert [(end["code"], end["decision"]) for end in _ends(run_dir)] == [(70, "stop")]


def test_a_run_that_a_person_wanted_to_stop_is_not_started_again_whatever_becomes_of_its_ranks(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with started("train", run_dir, ranks=2, overrides=(*endless(tmp_path / "shards"), "cluster.max_restarts=5")) as process:
        assert wait_until(lambda: _has_checkpoint(run_dir), process)
        pids = rank_pids(process.pid)
        os.kill(pids[1], signal.SIGSTOP)  # it cannot answer
        os.kill(process.pid, signal.SIGTERM)
        os.kill(pids[1], signal.SIGKILL)
        assert process.wait(60) == 70
    assert [(end["code"], end["decision"]) for end in _ends(run_dir)] == [(70, "stop")]


def test_a_stop_that_is_asked_for_in_the_folder_lets_all_ranks_commit(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = (*endless(tmp_path / "shards"), "cluster.max_restarts=5", "checkpoint.every_steps=1000000")
    with started("train", run_dir, ranks=2, overrides=overrides) as process:
        assert wait_until(lambda: (run_dir / "metrics.jsonl").exists() and _steps(run_dir) >= 2, process)
        request_stop(run_dir)
        assert process.wait(60) == 75
    steps = _steps(run_dir)
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step_{steps:06d}"]
    assert [(end["code"], end["decision"], end["committed_steps"]) for end in _ends(run_dir)] == [(75, "stop", steps)]
    finished = run("train", run_dir, ranks=2, overrides=(*overrides, "train.stop_after_steps=1"))
    assert finished.returncode == 75 and _steps(run_dir) == steps + 1, "the same command goes on from there"


def _steps(run_dir: Path) -> int:
    return (run_dir / "metrics.jsonl").read_bytes().count(b"\n")
