"""Inside a Slurm job: who is where, what srun is told, and what follows the ranks' end."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from launch.cluster import SlurmCluster
from launch.ends import Decision, End, read_end, record_end
from launch.job import Job
from launch.place import Place
from launch.slurm_job import Allocation, _end_of, allocated, run_here, srun_words
from launch.slurm_rank import place_of, tasks_of_node
from tests.launch.slurm_on_path import SlurmOnPath
from trainer.stop import request_stop

# What the real srun 22.05 gave the third task of --nodes=2 --ntasks=3, and what the batch step adds.
TASK = {
    "SLURM_JOB_ID": "11",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_TASKS_PER_NODE": "2,1",
}
BATCH_STEP = {"HALFSTEP_MASTER_ADDRESS": "10.0.0.1", "HALFSTEP_MASTER_PORT": "20077"}
ENDS_THE_STEP = "kill -TERM $PPID"
"""What slurmstepd does to a batch step whose job is queued again."""


@pytest.fixture
def in_a_job(slurm: SlurmOnPath, monkeypatch: pytest.MonkeyPatch) -> SlurmOnPath:
    """This process as the batch step of job 17 on one node, before the first attempt."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    slurm.says("scontrol show hostnames n1", "n1\n")
    slurm.says("scontrol show hostnames n[1-2]", "n1\nn2\n")
    return slurm


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run_dir = tmp_path / "run"
    (run_dir / "job").mkdir(parents=True)
    return Job("train", run_dir, {"allow_fresh": False})


def ends(job: Job) -> list[tuple[object, ...]]:
    lines = [json.loads(line) for line in (job.path / "job" / "ends.jsonl").read_text().splitlines()]
    return [(line["job_id"], line["code"], line["decision"]) for line in lines]


def test_a_task_knows_its_place_from_slurm_and_the_batch_step() -> None:
    assert place_of({**TASK, **BATCH_STEP}) == Place(
        rank=2, local_rank=0, local_world_size=1, world_size=3, master_address="10.0.0.1", master_port=20077
    )
    first = {**TASK, **BATCH_STEP, "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert place_of(first).variables() == {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "20077",
    }


@pytest.mark.parametrize("missing", ["SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE", "SLURM_NTASKS", *BATCH_STEP])
def test_a_rank_that_srun_did_not_start_names_what_is_missing(missing: str) -> None:
    variables = {name: value for name, value in {**TASK, **BATCH_STEP}.items() if name != missing}
    with pytest.raises(ValueError, match=rf"^{missing} is not set: this command is started by srun inside a halfstep job$"):
        place_of(variables)


@pytest.mark.parametrize(
    ("counts", "every"),
    [("1", [1]), ("8", [8]), ("4(x2),3", [4, 4, 3]), ("2,1", [2, 1]), ("1,2(x3),1", [1, 2, 2, 2, 1]), ("16(x12)", [16] * 12)],
)
def test_slurms_notation_of_tasks_is_spelt_out(counts: str, every: list[int]) -> None:
    assert [tasks_of_node(counts, node) for node in range(len(every))] == every


def test_srun_starts_a_task_a_rank_in_the_order_of_nodes() -> None:
    cluster = SlurmCluster(nodes=2, ranks_per_node=4, cpus_per_rank=3, python="/opt/python")
    job = Job("train", Path("/runs/a b"), {"allow_fresh": True, "previous_end": "70: a 'peer'"})
    assert srun_words(job, cluster) == [
        "srun",
        "--kill-on-bad-exit=1",
        "--nodes=2",
        "--ntasks=8",
        "--ntasks-per-node=4",
        "--cpus-per-task=3",
        "--distribution=block:block",
        "--unbuffered",
        "/opt/python",
        "-m",
        "launch.slurm_rank",
        "train",
        "/runs/a b",
        '{"allow_fresh": true, "previous_end": "70: a \'peer\'"}',
    ]


def test_a_container_stands_before_the_ranks_python_alone() -> None:
    words = srun_words(Job("train", Path("/run"), {}), SlurmCluster(container='apptainer exec --bind "/a b:/data" x.sif', python="py"))
    assert words[words.index("--unbuffered") + 1 : -3] == [
        "apptainer",
        "exec",
        "--bind",
        "/a b:/data",
        "x.sif",
        "py",
        "-m",
        "launch.slurm_rank",
    ]
    assert srun_words(Job("train", Path("/run"), {}), SlurmCluster())[8] == sys.executable


def test_an_allocation_is_read_from_slurms_variables(in_a_job: SlurmOnPath) -> None:
    variables = {"SLURM_JOB_ID": "11", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert Allocation.read(variables) == Allocation("11", ("n1", "n2"), 0)
    assert Allocation.read({**variables, "SLURM_RESTART_COUNT": "3"}).restarts == 3


def test_an_element_of_an_array_never_goes_by_the_arrays_own_number(in_a_job: SlurmOnPath) -> None:
    """The real one gave element 1 of array 12 the job id 12; `scontrol requeue 12` queues every element again."""
    element = {"SLURM_JOB_ID": "12", "SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "1", "SLURM_JOB_NODELIST": "n1"}
    assert Allocation.read(element).job_id == "12_1"


def test_outside_of_a_job_there_is_no_allocation() -> None:
    with pytest.raises(ValueError, match=r"^SLURM_JOB_ID is not set: .* \(sbatch, salloc\); leave --here out to submit one$"):
        Allocation.read({})


@pytest.mark.parametrize(
    ("variables", "overrides"),
    [
        ({"SLURM_TASKS_PER_NODE": "1"}, ["nodes=1", "ranks_per_node=1", "cpus_per_rank=1"]),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_TASKS_PER_NODE": "4"}, ["nodes=1", "ranks_per_node=4", "cpus_per_rank=1"]),
        (
            {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)", "SLURM_CPUS_PER_TASK": "6"},
            ["nodes=2", "ranks_per_node=2", "cpus_per_rank=6"],
        ),
        ({"SLURM_JOB_NODELIST": "n[1-2]"}, ["nodes=2", "ranks_per_node=1", "cpus_per_rank=1"]),
    ],
)
def test_a_job_that_was_submitted_by_hand_runs_on_what_it_was_given(
    variables: Mapping[str, str], overrides: list[str], in_a_job: SlurmOnPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert allocated() == overrides


def test_nodes_with_different_numbers_of_tasks_are_refused(in_a_job: SlurmOnPath, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_TASKS_PER_NODE", "2,1")
    with pytest.raises(ValueError, match=r"nodes have 2,1 tasks, and ranks are as many on every node; give sbatch --ntasks-per-node=N$"):
        allocated()


def test_here_outside_of_a_job_is_bad_input_and_writes_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    words = [sys.executable, "-m", "launch", "train", "smoke", "--cluster", "slurm", "--here"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: SLURM_JOB_ID is not set: this runs inside a Slurm job") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("code", "end"),
    [
        (0, End(0, "done")),
        (1, End(1, "a rank ended with exit code 1; see logs/")),
        (64, End(64, "a rank ended with exit code 64; see logs/")),
        (65, End(65, "a rank ended with exit code 65; see logs/")),
        (66, End(66, "a rank ended with exit code 66; see logs/")),
        (70, End(70, "a rank ended with exit code 70; see logs/")),
        (74, End(74, "a rank ended with exit code 74; see logs/")),
        (75, End(75, "a rank ended with exit code 75; see logs/")),
        (127, End(1, "a rank ended with exit code 127; see logs/")),
        (128, End(1, "a rank ended with exit code 128; see logs/")),
        (255, End(1, "a rank ended with exit code 255; see logs/")),
        (139, End(70, "a rank was killed by SIGSEGV")),
        (143, End(70, "a rank was killed by SIGTERM")),
        (-15, End(70, "a rank was killed by SIGTERM")),
    ],
)
def test_every_exit_code_of_srun_is_an_end(code: int, end: End) -> None:
    assert _end_of(code) == end


@pytest.mark.parametrize("code", [137, -9])
def test_a_kill_points_at_the_memory(code: int) -> None:
    end = _end_of(code)
    assert end.code == 70
    assert end.reason.startswith("a rank was killed by SIGKILL; if memory ran out (the log says oom-kill): cluster.memory_gib_per_rank")


@pytest.mark.parametrize(
    ("code", "decision", "asked"),
    [
        (0, "done", []),
        (64, "stop", []),
        (66, "stop", []),
        (75, "again", ["scontrol requeue 17"]),
        (137, "again", ["scontrol requeue 17"]),
        (74, "hold", ["scontrol requeuehold 17"]),
    ],
)
def test_the_batch_step_does_what_the_ranks_end_asks_for(
    code: int, decision: Decision, asked: list[str], in_a_job: SlurmOnPath, job: Job
) -> None:
    in_a_job.says("srun", code=code)
    in_a_job.job_is("17", "running")
    for words in ("scontrol requeue 17", "scontrol requeuehold 17"):
        in_a_job.says(words, then=ENDS_THE_STEP)
    assert run_here(job, SlurmCluster()) == _end_of(code).code
    assert ends(job) == [("17", _end_of(code).code, decision)]
    assert read_end(job.path) == _end_of(code)
    assert [call for call in in_a_job.calls if call.startswith("scontrol requeue")] == asked
    [srun] = [call for call in in_a_job.calls if call.startswith("srun")]
    assert srun.endswith(' {"allow_fresh": false, "previous_end": null}')


def test_what_a_rank_says_of_its_end_counts_more_than_sruns_exit_code(in_a_job: SlurmOnPath, job: Job) -> None:
    record_end(job.path, End(66, "loss is nan", 3))
    (job.path / "exit.json").rename(job.path / "said.json")
    in_a_job.says("srun", code=137, then=f"cp '{job.path}/said.json' '{job.path}/exit.json'")
    assert run_here(job, SlurmCluster()) == 66
    assert ends(job) == [("17", 66, "stop")] and read_end(job.path) == End(66, "loss is nan", 3)


def test_the_next_attempt_is_told_how_the_last_one_ended(in_a_job: SlurmOnPath, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    record_end(job.path, End(75, "asked to stop"))
    in_a_job.says("srun")
    assert run_here(job, SlurmCluster()) == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    (job.path / "exit.json").unlink()
    assert run_here(job, SlurmCluster()) == 0
    told = [json.loads(call[call.index("{") :])["previous_end"] for call in in_a_job.calls if call.startswith("srun")]
    assert told == ["75: asked to stop", "the job was lost: preempted at once, or its node failed"]


@pytest.mark.parametrize("line", ["completing", "preempted, completing", "cancelled"])
def test_a_job_that_slurm_ends_itself_is_not_queued_again(line: str, in_a_job: SlurmOnPath, job: Job) -> None:
    in_a_job.says("srun", code=75)
    in_a_job.job_is("17", line)
    assert run_here(job, SlurmCluster()) == 75
    assert ends(job) == [("17", 75, "stop")] and not any("requeue" in call for call in in_a_job.calls)


def test_a_job_that_is_over_its_limit_is_queued_again(in_a_job: SlurmOnPath, job: Job) -> None:
    in_a_job.says("srun", code=143)
    in_a_job.says("scontrol --oneliner show job 17", "JobId=17 JobState=COMPLETING RunTime=00:10:03 TimeLimit=00:10:00\n")
    in_a_job.says("scontrol requeue 17", then=ENDS_THE_STEP)
    run_here(job, SlurmCluster())
    assert ends(job) == [("17", 70, "again")]


def test_an_element_asks_for_itself_alone(in_a_job: SlurmOnPath, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    in_a_job.says("srun", code=75)
    in_a_job.job_is("17_3", "element running")
    in_a_job.says("scontrol requeue 17_3", then=ENDS_THE_STEP)
    assert run_here(job, SlurmCluster()) == 75
    assert in_a_job.calls[-1] == "scontrol requeue 17_3" and ends(job) == [("17_3", 75, "again")]


def test_halfstep_stop_keeps_it_down(in_a_job: SlurmOnPath, job: Job) -> None:
    in_a_job.says("srun", code=75)
    request_stop(job.path)
    assert run_here(job, SlurmCluster()) == 75
    assert ends(job) == [("17", 75, "stop")]


@pytest.mark.parametrize(
    ("setting", "code", "told"),
    [("(null)", 75, "give the same halfstep command again to go on"), ("99,100", 99, "leaving with an exit code that this site requeues")],
)
def test_a_site_that_lets_nobody_requeue_is_left_with_what_it_requeues(
    setting: str, code: int, told: str, in_a_job: SlurmOnPath, job: Job, capsys: pytest.CaptureFixture[str]
) -> None:
    in_a_job.says("srun", code=75)
    in_a_job.job_is("17", "running")
    in_a_job.says("scontrol requeue 17", err="Requested operation is presently disabled for job 17\n", code=1)
    in_a_job.says("scontrol show config", f"RequeueExit             = {setting}\nRequeueExitHold         = 7\n")
    assert run_here(job, SlurmCluster()) == code
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"halfstep: scontrol requeue 17: Requested operation is presently disabled for job 17; {told}"
    )


def test_a_run_that_gets_no_further_stays_down(in_a_job: SlurmOnPath, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    in_a_job.says("srun", code=137)
    in_a_job.job_is("17", "running")
    in_a_job.says("scontrol requeue 17", then=ENDS_THE_STEP)
    for restarts in range(4):
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        run_here(job, SlurmCluster(max_restarts=2))
    assert [decision for _, _, decision in ends(job)] == ["again", "again", "stop", "stop"]
    assert sum(call.startswith("srun") for call in in_a_job.calls) == 3, "the fourth attempt is one too many: it starts no ranks"
