"""Runs in a queue: going on with what is there already, following it, ending it."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from launch import logs, queued
from launch.ends import End, record_end
from launch.queued import alive, follow, is_running, let_go_on, stop
from launch.submitted import Submission, record_submission
from launch.sweep import write_sweep
from tests.launch.slurm_on_path import SlurmOnPath
from trainer.stop import is_stop_requested


@pytest.fixture(autouse=True)
def look_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(logs, "_LEFT_SECONDS", 0.02)
    monkeypatch.setattr(queued, "_LOOK_SECONDS", 0.01)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was queued as job 17."""
    return submitted(tmp_path / "run", "17")


def submitted(run_dir: Path, *job_ids: str) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    for job_id in job_ids:
        record_submission(run_dir, Submission("slurm", job_id, f"job/slurm-{job_id}.out"))
    return run_dir


def chain_of(path: Path) -> tuple[Path, Path]:
    """A chain of two stages that it trains, and a teacher from elsewhere."""
    path.mkdir()
    stages = [{"name": "teacher", "steps": 4, "run_dir": "/teacher"}]
    stages += [{"name": name, "steps": steps, "run_dir": name} for name, steps in (("stage_01", 2), ("stage_02", 1))]
    (path / "chain.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
    (path / "stage_01").mkdir()
    (path / "stage_02").mkdir()
    return path / "stage_01", path / "stage_02"


def test_a_run_that_was_never_queued_asks_no_queue(tmp_path: Path, slurm: SlurmOnPath) -> None:
    assert alive(tmp_path) == [] and not let_go_on(tmp_path) and not is_running(tmp_path)
    assert not (slurm.folder / "calls").exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("pending", "job 17 is queued (Resources) already; nothing is submitted"),
        ("requeued", "job 17 is queued (BeginTime) already; nothing is submitted"),
        ("running", "job 17 is running (on n[1-2]) already; nothing is submitted"),
        ("completing", "job 17 is running (on n1) already; nothing is submitted"),
    ],
)
def test_a_job_that_waits_or_runs_goes_on(state: str, said: str, run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.job_is("17", state)
    assert let_go_on(run)
    assert capsys.readouterr().err == f"{run}: {said}\n" and slurm.calls == []


def test_a_held_job_is_released_and_counts_its_restarts_anew(run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "job" / "restarts.json").write_text("{}")
    slurm.job_is("17", "requeued in held state")
    slurm.says("scontrol release 17")
    assert let_go_on(run)
    assert slurm.calls == ["scontrol release 17"] and not (run / "job" / "restarts.json").exists()
    assert capsys.readouterr().err == f"{run}: job 17 was held and is released; nothing else is submitted\n"


@pytest.mark.parametrize("state", ["completed", "failed", "cancelled", "preempted", "timed out", "node failed", None])
def test_a_job_that_is_over_or_forgotten_lets_another_be_queued(state: str | None, run: Path, slurm: SlurmOnPath) -> None:
    if state:
        slurm.job_is("17", state)
    else:
        slurm.does_not_know("17")
    assert not let_go_on(run) and alive(run) == [] and slurm.calls == []


def test_the_newest_job_counts(tmp_path: Path, slurm: SlurmOnPath) -> None:
    run = submitted(tmp_path / "run", "17", "18")
    slurm.job_is("18", "pending")
    assert [(job.submission.job_id, job.state, job.why) for job in alive(run)] == [("18", "queued", "Resources")]


def test_a_queue_that_cannot_be_asked_never_lets_a_second_job_be_queued(run: Path, slurm: SlurmOnPath) -> None:
    slurm.is_dead("17")
    with pytest.raises(RuntimeError, match="Unable to contact slurm controller"):
        let_go_on(run)


def test_the_jobs_of_a_chain_and_of_its_stages_are_found(tmp_path: Path, slurm: SlurmOnPath) -> None:
    one, two = chain_of(tmp_path / "chain")
    submitted(one, "17")
    submitted(two, "18")
    slurm.job_is("17", "running")
    slurm.job_is("18", "dependency")
    assert [(job.run_dir, job.state) for job in alive(tmp_path / "chain")] == [(one, "running"), (two, "queued")]


def test_the_elements_of_a_sweep_are_found(tmp_path: Path, slurm: SlurmOnPath) -> None:
    runs = [submitted(tmp_path / f"00{element}_seed={element}", f"17_{element}") for element in range(3)]
    write_sweep(tmp_path, runs)
    slurm.job_is("17_0", "element running")
    slurm.does_not_know("17_1")
    slurm.job_is("17_2", "element of a waiting array")
    assert [(job.run_dir, job.state) for job in alive(tmp_path)] == [(runs[0], "running"), (runs[2], "queued")]


def test_following_shows_the_output_and_ends_with_the_runs_exit_code(
    run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "job" / "slurm-17.out").write_text("step 1/2\nstep 2/2\n")
    record_end(run, End(66, "loss is nan"))
    slurm.job_is("17", "pending", "running", "completing", "requeued", "running", "failed")
    assert follow(run) == 66
    assert capsys.readouterr().out == "step 1/2\nstep 2/2\n"


def test_following_a_job_that_was_cancelled_before_it_ran_says_so(
    run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.job_is("17", "pending", "cancelled before it ran")
    assert follow(run) == 1
    assert capsys.readouterr().err == f"{run}: job 17 has not said how it ended: cancelled or held (halfstep status {run})\n"


def test_following_a_chain_ends_with_the_stage_that_failed(tmp_path: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = chain_of(tmp_path / "chain")
    for stage, job_id in ((one, "17"), (two, "18")):
        submitted(stage, job_id)
        (stage / "job" / f"slurm-{job_id}.out").write_text(f"{stage.name}\n")
        slurm.job_is(job_id, "failed")
    record_end(one, End(0, "done"))
    record_end(two, End(0, "done"))
    assert follow(tmp_path / "chain") == 0 and capsys.readouterr().out == "stage_01\nstage_02\n"
    record_end(one, End(66, "loss is nan"))
    assert follow(tmp_path / "chain") == 66 and capsys.readouterr().out == "stage_01\n"


def test_following_a_sweep_goes_on_after_a_run_that_failed(tmp_path: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [submitted(tmp_path / f"00{element}_seed={element}", f"17_{element}") for element in range(3)]
    write_sweep(tmp_path, runs)
    for element, (run, code) in enumerate(zip(runs, (0, 66, 1), strict=True)):
        (run / "job" / f"slurm-17_{element}.out").write_text(f"{run.name}\n")
        record_end(run, End(code, "x"))
        slurm.does_not_know(f"17_{element}")
    assert follow(tmp_path) == 66
    assert capsys.readouterr().out == "000_seed=0\n001_seed=1\n002_seed=2\n"


@pytest.mark.parametrize("state", ["pending", "held by its user"])
def test_stop_takes_what_waits_out_of_the_queue(state: str, run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.job_is("17", state)
    slurm.says("scancel 17")
    assert stop(run, wait=True) == 0
    assert slurm.calls == ["scancel 17"] and not is_stop_requested(run)
    word = "queued" if state == "pending" else "held"
    assert capsys.readouterr().err == f"{run}: job 17 was {word} and is cancelled\n{run}: nothing of it was running\n"


def test_stop_asks_what_runs_and_waits_for_its_end(run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.job_is("17", "running", "running", "completing", "failed")
    assert stop(run, wait=True) == 0
    assert is_stop_requested(run) and slurm.calls == []
    assert capsys.readouterr().err == f"{run}: told to commit a checkpoint and end; the same command goes on from there\n"
    assert alive(run) == [], "stop has waited for the last answer"


def test_stop_need_not_wait(run: Path, slurm: SlurmOnPath) -> None:
    slurm.job_is("17", "running")
    assert stop(run, wait=False) == 0 and is_stop_requested(run) and is_running(run)


def test_stop_of_a_chain_asks_the_stage_that_runs_and_cancels_the_others(tmp_path: Path, slurm: SlurmOnPath) -> None:
    one, two = chain_of(tmp_path / "chain")
    submitted(one, "17")
    submitted(two, "18")
    slurm.job_is("17", "running")
    slurm.job_is("18", "dependency")
    slurm.says("scancel 18")
    stop(tmp_path / "chain", wait=False)
    assert is_stop_requested(one) and not is_stop_requested(two) and slurm.calls == ["scancel 18"]


def test_stop_of_a_run_that_is_over_does_nothing(run: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.job_is("17", "completed")
    assert stop(run, wait=True) == 0
    assert capsys.readouterr().err == f"{run}: is not running\n" and not is_stop_requested(run)


def test_stop_reaches_a_run_of_this_machine_by_its_lock(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    descriptor = os.open(tmp_path / ".lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    try:
        stop(tmp_path, wait=False)
    finally:
        os.close(descriptor)
    assert is_stop_requested(tmp_path)
