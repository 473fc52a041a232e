"""What Slurm's commands say of a job, from lines of the real ones, and what is said where they do not answer."""

import shutil
import sys

import pytest

from launch import slurm_commands
from launch.slurm_commands import JobState, SlurmJob, find_job, parse_job, slurm
from tests.launch.slurm_on_path import SlurmOnPath, captured, show


@pytest.mark.parametrize(
    ("line", "job_id", "state", "word", "reason", "nodes"),
    [
        ("pending", "2", "queued", "PENDING", "Resources", ""),
        ("dependency", "4", "queued", "PENDING", "Dependency", ""),
        ("held by its user", "3", "held", "PENDING", "JobHeldUser", ""),
        ("requeued in held state", "1", "held", "PENDING", "job_requeued_in_held_state", ""),
        ("requeued", "15", "queued", "PENDING", "BeginTime", ""),
        ("running", "1", "running", "RUNNING", "", "n[1-2]"),
        ("completing", "10", "running", "COMPLETING", "", "n1"),
        ("preempted, completing", "11", "running", "COMPLETING", "", "n1"),
        ("preempted", "1", "ended", "PREEMPTED", "", "n1"),
        ("cancelled", "10", "ended", "CANCELLED", "", "n1"),
        ("cancelled before it ran", "2", "ended", "CANCELLED", "Resources", ""),
        ("completed", "14", "ended", "COMPLETED", "", "n2"),
        ("failed", "13", "ended", "FAILED", "NonZeroExitCode", "n2"),
        ("timed out", "14", "ended", "TIMEOUT", "TimeLimit", "n1"),
        ("node failed", "16", "ended", "NODE_FAIL", "NodeDown", "n2"),
        ("element running", "5_0", "running", "RUNNING", "", "n1"),
        ("element pending", "5_5", "queued", "PENDING", "JobArrayTaskLimit", ""),
        ("element requeued", "12_1", "queued", "PENDING", "BeginTime", ""),
        ("element of a waiting array", "7_2", "queued", "PENDING", "Priority", ""),
    ],
)
def test_lines_of_the_real_slurm_are_understood(line: str, job_id: str, state: JobState, word: str, reason: str, nodes: str) -> None:
    job = parse_job(captured(line))
    assert (job.job_id, job.state, job.word, job.reason, job.nodes) == (job_id, state, word, reason, nodes)


def test_a_job_that_came_back_counts_its_restarts() -> None:
    assert [parse_job(captured(line)).restarts for line in ("running", "preempted, completing", "requeued in held state")] == [0, 1, 1]


@pytest.mark.parametrize(
    ("run_time", "limit", "over"),
    [
        ("00:09:59", "00:10:00", False),
        ("00:10:00", "00:10:00", True),
        ("1-02:03:59", "1-02:04:00", False),
        ("1-02:04:00", "1-02:04:00", True),
        ("23:59:59", "1-00:00:00", False),
        ("400-00:00:00", "UNLIMITED", False),
        ("00:00:00", "Partition_Limit", False),
    ],
)
def test_a_job_is_over_its_limit_from_its_last_second(run_time: str, limit: str, over: bool) -> None:
    words = captured("running").replace("RunTime=00:00:01", f"RunTime={run_time}").replace("TimeLimit=00:10:00", f"TimeLimit={limit}")
    assert f"RunTime={run_time} TimeLimit={limit}" in words
    assert parse_job(words).over_limit is over


def test_only_a_job_that_was_timed_out_is_over_its_limit() -> None:
    lines = ("running", "running for days", "completing", "preempted", "cancelled", "requeued", "timed out")
    assert [line for line in lines if parse_job(captured(line)).over_limit] == ["timed out"]


def test_a_word_of_a_later_slurm_is_an_end_and_a_bare_line_is_read() -> None:
    assert parse_job("JobId=7 JobState=BOOT_FAIL,REQUEUE") == SlurmJob("7", "ended", "BOOT_FAIL", "", "", 0, False)


def test_a_job_is_found_by_its_id(slurm: SlurmOnPath) -> None:
    slurm.job_is("17", "running")
    slurm.job_is("18_3", "element running")
    found = find_job("17"), find_job("18_3")
    assert [job and (job.job_id, job.state) for job in found] == [("17", "running"), ("18_3", "running")]


@pytest.mark.parametrize("job_id", ["99999", "5_7"])
def test_a_job_that_slurm_has_forgotten_is_none(job_id: str, slurm: SlurmOnPath) -> None:
    slurm.does_not_know(job_id)
    assert find_job(job_id) is None


def test_a_dead_controller_is_said_in_slurms_own_words(slurm: SlurmOnPath) -> None:
    slurm.is_dead("17")
    with pytest.raises(RuntimeError) as caught:
        find_job("17")
    assert str(caught.value) == f"{show('17')}: slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


def test_a_command_that_gives_no_answer_asks_about_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slurm_commands, "_TIMEOUT_SECONDS", 0.2)
    with pytest.raises(RuntimeError, match=r"^\S+: no answer within 0\.2 s; is slurmctld running\? \(halfstep doctor\)$"):
        slurm([shutil.which("sleep") or "sleep", "10"])


def test_a_machine_without_slurm_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ValueError, match=r"^scontrol: no such command; Slurm's commands are not on this machine \(halfstep doctor\)$"):
        find_job("17")


def test_what_a_command_prints_comes_back_and_words_are_not_a_shells(slurm: SlurmOnPath) -> None:
    del slurm
    assert slurm_commands.slurm([sys.executable, "-c", "import sys; print(sys.argv[1:])", "a b", "$HOME"]) == "['a b', '$HOME']\n"


def test_a_refused_job_script_is_said_in_sbatchs_words(slurm: SlurmOnPath) -> None:
    refused = (
        "sbatch: error: invalid partition specified: nope\nsbatch: error: Batch job submission failed: Invalid partition name specified"
    )
    slurm.says("sbatch --parsable /x/train.sbatch", err=refused + "\n", code=1)
    with pytest.raises(RuntimeError) as caught:
        slurm_commands.slurm(["sbatch", "--parsable", "/x/train.sbatch"])
    assert str(caught.value) == f"sbatch --parsable /x/train.sbatch: {refused}"
