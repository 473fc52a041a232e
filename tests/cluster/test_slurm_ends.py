"""Every way in which a job can end on a real Slurm, and what follows: queued again, stopped, or held."""

import os
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import SlurmRun, assert_same, halfstep, lines, local_run, logged_steps
from tests.cluster.slurm_cluster import Slurm, rank_pids

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]

QUIET = ("logging.sample_every_steps=0", "train.steps=40", "checkpoint.every_steps=10", "cluster.max_restarts=1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "SPECIAL_EXIT")


def decisions(run: SlurmRun) -> list[tuple[object, object]]:
    """Exit code and decision of each attempt."""
    return [(end["code"], end["decision"]) for end in run.ends()]


def exit_code(slurm: Slurm, run: SlurmRun) -> str:
    """Of the job, as Slurm keeps it."""
    return slurm.facts(run.job_id)["ExitCode"].split(":")[0]


def start(slurm: Slurm, run_dir: Path, shards: Path, *overrides: str) -> SlurmRun:
    return SlurmRun.submit(slurm, run_dir, f"data.shards={shards}", *QUIET, *overrides)


def test_done_is_0(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    run = start(slurm, tmp_path / "run", shards)
    run.finish()
    assert decisions(run) == [(0, "done")] and exit_code(slurm, run) == "0"
    again = run.again()
    assert again.returncode == 0 and "is done; nothing is submitted" in again.stderr


def test_75_is_queued_again_for_as_long_as_it_comes_further(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    """Four attempts of ten steps with a cap of one: progress resets the count."""
    run = start(slurm, tmp_path / "run", shards, "train.stop_after_steps=10")
    run.finish()
    assert decisions(run) == [(75, "again")] * 4 + [(0, "done")] or decisions(run) == [(75, "again")] * 3 + [(0, "done")]


def test_70_is_queued_again_but_not_for_ever(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    """A rank that is killed before the first checkpoint, each time: one more attempt, then the cap of one."""
    run = start(slurm, tmp_path / "run", shards, "checkpoint.every_steps=1000", "train.steps=100000")
    for attempt in (1, 2):
        slurm.wait_until(
            run.job_id, lambda attempt=attempt: len(lines(run.run_dir / "attempts.jsonl")) == attempt, f"attempt {attempt} to begin"
        )
        run.wait_for_step(2)
        os.kill(next(iter(rank_pids(run.run_dir))), signal.SIGKILL)
        slurm.wait_until(run.job_id, lambda attempt=attempt: len(run.ends()) == attempt, f"end {attempt}")
    assert run.wait_for(*ENDED) == "FAILED"
    assert decisions(run) == [(70, "again"), (70, "stop")] and exit_code(slurm, run) == "70"
    assert "came no further than step 0 (cluster.max_restarts=1)" in str(run.ends()[-1]["why"])
    status = halfstep("status", run.run_dir, environment=slurm.environment).stdout
    assert "failed" in status and "killed by SIGKILL" in status


def test_a_rank_that_cannot_start_is_a_crash_which_the_cap_ends(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    broken = _script(tmp_path / "broken", "exit 3")
    run = start(slurm, tmp_path / "run", shards, f"cluster.container={broken}")
    assert run.wait_for(*ENDED) == "FAILED"
    assert decisions(run) == [(1, "again"), (1, "stop")]


def test_64_stops(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    """Shards that disappear while the job waits."""
    own = tmp_path / "shards"
    shutil.copytree(shards, own)
    run = start(slurm, tmp_path / "run", own, "cluster.extra_sbatch_lines=[--hold]")
    shutil.rmtree(own)
    slurm.run("scontrol", "release", run.job_id)
    assert run.wait_for(*ENDED) == "FAILED"
    assert decisions(run) == [(64, "stop")] and exit_code(slurm, run) == "64"


def test_65_stops(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    """More damaged samples than the recipe allows."""
    own = tmp_path / "shards"
    shutil.copytree(shards, own)
    run = start(slurm, tmp_path / "run", own, "data.on_bad_sample=skip", "data.max_bad_samples=0", "cluster.extra_sbatch_lines=[--hold]")
    _damage(own)
    slurm.run("scontrol", "release", run.job_id)
    assert run.wait_for(*ENDED) == "FAILED"
    assert decisions(run) == [(65, "stop")] and exit_code(slurm, run) == "65", run.log()


def test_66_stops(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    """A learning rate that no weights survive."""
    run = start(slurm, tmp_path / "run", shards, "optim.learning_rate=1e30", "lr_schedule={kind: constant}")
    assert run.wait_for(*ENDED) == "FAILED"
    assert decisions(run) == [(66, "stop")] and exit_code(slurm, run) == "66", run.log()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    tried = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(mount)], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"a small file system cannot be mounted here, which takes root: {tried.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_74_holds_until_there_is_room_and_the_same_command_lets_it_go_on(
    slurm: Slurm, shards: Path, small_disk: Path, tmp_path: Path
) -> None:
    run = start(slurm, small_disk / "run", shards)
    slurm.wait_until(run.job_id, lambda: bool(run.ends()) and slurm.state(run.job_id) == "PENDING", "the job to be held")
    assert decisions(run)[-1] == (74, "hold"), run.log()
    status = halfstep("status", run.run_dir, environment=slurm.environment).stdout
    assert ": held, " in status and "No space left" in status, status
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    again = run.again()
    assert again.returncode == 0 and "was held and is released; nothing else is submitted" in again.stderr
    run.finish()
    local_run(tmp_path / "reference", 1, (f"data.shards={shards}", *QUIET[:3]))
    assert_same(run.run_dir, tmp_path / "reference")


def test_scancel_commits_and_does_not_come_back(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    run = start(slurm, tmp_path / "run", shards, "train.steps=100000")
    run.wait_for_step(3)
    slurm.run("scancel", run.job_id)
    assert run.wait_for(*ENDED) == "CANCELLED"
    assert decisions(run) == [(75, "stop")]


def test_halfstep_stop_commits_and_the_same_command_goes_on(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    run = start(slurm, tmp_path / "run", shards, "train.steps=100000", "cluster.max_restarts=5")
    run.wait_for_step(3)
    stopped = halfstep("stop", run.run_dir, environment=slurm.environment)
    assert stopped.returncode == 0 and "told to commit a checkpoint" in stopped.stderr
    assert run.wait_for(*ENDED) == "FAILED" and decisions(run) == [(75, "stop")]
    before = logged_steps(run.run_dir)
    first = run.job_id
    assert run.again().returncode == 0 and run.job_id != first
    run.wait_for_step(before + 1)
    halfstep("stop", run.run_dir, environment=slurm.environment)
    assert [attempt["step"] for attempt in lines(run.run_dir / "attempts.jsonl")] == [0, before]


def test_halfstep_stop_takes_a_waiting_job_out_of_the_queue(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    run = start(slurm, tmp_path / "run", shards, "cluster.extra_sbatch_lines=[--begin=now+1hour]")
    assert ": queued, " in halfstep("status", run.run_dir, environment=slurm.environment).stdout
    assert "is cancelled" in halfstep("stop", run.run_dir, environment=slurm.environment).stderr
    assert slurm.state(run.job_id) == "CANCELLED"


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def _damage(shards: Path) -> None:
    """Change a byte of one image in each tar; the headers stay."""
    for path in shards.glob("*.tar"):
        path.write_bytes(path.read_bytes().replace(b"IHDR", b"IHDX", 1))
