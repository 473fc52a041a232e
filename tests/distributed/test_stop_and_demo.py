"""A run that is asked to stop comes back; the demo goes the whole way and can be given again."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.demo import run_demo
from tests.distributed.runs import curves, delivered, rank_pids, run, started, wait_until
from trainer.hash import hash_run

pytestmark = pytest.mark.distributed


def _tell_the_command(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGUSR1)


def _tell_rank_1(process: subprocess.Popen[bytes]) -> None:
    os.kill(rank_pids(process.pid)[1], signal.SIGTERM)


def _tell_everyone(process: subprocess.Popen[bytes]) -> None:
    """As Slurm does: the command, its ranks and their loader processes."""
    os.killpg(process.pid, signal.SIGTERM)


@pytest.mark.parametrize("tell", [_tell_the_command, pytest.param(_tell_rank_1, marks=pytest.mark.all_cases), _tell_everyone])
def test_a_signal_ends_in_a_checkpoint_and_75_and_the_same_command_goes_on(
    two_ranks: Path, tmp_path: Path, tell: Callable[[subprocess.Popen[bytes]], None]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_ranks / "shards", run_dir / "shards")
    with started("distill", run_dir, ranks=2, overrides=("data.workers=1",)) as process:
        assert wait_until(lambda: delivered(run_dir) >= 10, process)
        tell(process)
        assert process.wait(60) == 75
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 75
    resumed = run("distill", run_dir, ranks=2)
    assert resumed.returncode == 0, resumed.stderr
    assert curves(run_dir) == curves(two_ranks)
    assert hash_run(run_dir) == hash_run(two_ranks)
    attempts = [json.loads(line) for line in (run_dir / "stage_00_1000_steps" / "attempts.jsonl").read_text().splitlines()]
    assert [attempt["previous_end"] for attempt in attempts] == [None, "75: asked to stop; the same command goes on from the checkpoint"]


def test_a_limit_of_steps_is_the_attempts_not_the_stages(two_ranks: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(two_ranks / "shards", run_dir / "shards")
    for steps_so_far in (30, 40):  # 24 of the teacher, then 8 a student
        limit = "train.stop_after_steps=30" if steps_so_far == 30 else "train.stop_after_steps=20"
        ended = run("distill", run_dir, ranks=2, overrides=(limit,))
        assert ended.returncode == (75 if steps_so_far == 30 else 0), ended.stderr
        assert sum(len(curve.losses) for curve in curves(run_dir).values()) == steps_so_far
    assert hash_run(run_dir) == hash_run(two_ranks)


def test_a_run_and_a_chain_do_not_share_a_folder(two_ranks: Path) -> None:
    refused = run("train", two_ranks, ranks=2)
    assert refused.returncode == 2 and "holds a chain of halvings" in refused.stderr
    refused = run("distill", two_ranks / "stage_00_1000_steps", ranks=2)
    assert refused.returncode == 2 and "holds a single run" in refused.stderr


def test_the_demo_goes_the_whole_way_and_again_costs_little(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert run_demo(out, ranks=2, recipe="smoke", held_out=64, images=16) == 0
    rows = json.loads((out / "evaluation.json").read_text())
    assert {row["model"] for row in rows} == {"student", "teacher"}
    assert all(row["frechet_distance"] is not None for row in rows if row["steps"] <= 32)
    report = (out / "report.html").read_text()
    assert "<svg" in report and "data:image/png;base64," in report and (out / "grid.png").exists()
    before = (out / "evaluation.json").read_bytes()
    assert run_demo(out, ranks=2, recipe="smoke", held_out=64, images=16) == 0
    assert (out / "evaluation.json").read_bytes() == before
