"""Status reads a run's folder and nothing else."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from launch.ends import End, record_end
from launch.status import print_status, run_status
from launch.submitted import Submission, record_submission
from launch.sweep import write_sweep
from tests.launch.slurm_on_path import SlurmOnPath


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


def test_the_role_of_the_data_is_said(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "recipe.yaml").write_text("data: {shards: x, role: teacher_samples}\ntrain: {steps: 10}\n")
    assert run_status(run_dir, ended=None).data_role == "teacher_samples"
    print_status(run_dir, as_json=False)
    assert "stopped, step 4/10, data: teacher samples, loss 0.5000" in capsys.readouterr().out


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


def test_a_run_whose_export_is_a_lora_is_done(run_dir: Path) -> None:
    """It is no pipeline and has no model_index.json."""
    (run_dir / "checkpoints" / "step_000010").mkdir(parents=True)
    (run_dir / "export").mkdir()
    for file in ("checkpoints/step_000010/manifest.json", "export/descriptor.json", "export/manifest.json"):
        (run_dir / file).touch()
    assert run_status(run_dir, ended=None).state == "done"


def test_json_names_what_others_rely_on(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert print_status(run_dir, as_json=True) == 0
    fields = json.loads(capsys.readouterr().out)
    assert {"state", "step", "attempts", "job_ids"} <= fields.keys()


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no recipe\.yaml there"):
        print_status(tmp_path, as_json=False)


def queue(run_dir: Path, *job_ids: str) -> None:
    for job_id in job_ids:
        record_submission(run_dir, Submission("slurm", job_id, f"job/slurm-{job_id}.out"))


def finish(run_dir: Path, steps: int) -> None:
    """A run that has taken all its steps and written its export."""
    for manifest in (run_dir / "checkpoints" / f"step_{steps:06d}" / "manifest.json", run_dir / "export" / "model_index.json"):
        manifest.parent.mkdir(parents=True)
        manifest.touch()


def new_run(run_dir: Path, steps: int) -> Path:
    run_dir.mkdir(parents=True)
    (run_dir / "recipe.yaml").write_text(f"data: {{shards: x}}\ntrain: {{steps: {steps}}}\n")
    return run_dir


def as_json(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    print_status(path, as_json=True)
    return json.loads(capsys.readouterr().out)


def as_lines(path: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_status(path, as_json=False)
    return capsys.readouterr().out.replace(f"{path}", "PATH").splitlines()


@pytest.mark.parametrize(
    ("job", "line"),
    [
        ("pending", "PATH: queued, step 4/10, loss 0.5000, 100 images/s, 2 attempts, job 18 (Resources), last end: 75 asked to stop"),
        (
            "requeued in held state",
            "PATH: held, step 4/10, loss 0.5000, 100 images/s, 2 attempts, job 18 (job_requeued_in_held_state), last end: 75 asked to stop",
        ),
        ("running", "PATH: running, step 4/10, loss 0.5000, 100 images/s, about 0.2 minutes left, 2 attempts, on n1 n2, job 18"),
        ("completed", "PATH: stopped, step 4/10, loss 0.5000, 100 images/s, 2 attempts, job 18, last end: 75 asked to stop"),
        (None, "PATH: stopped, step 4/10, loss 0.5000, 100 images/s, 2 attempts, job 18, last end: 75 asked to stop"),
    ],
)
def test_a_queued_run_says_where_its_job_is(
    job: str | None, line: str, run_dir: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    queue(run_dir, "17", "18")
    (run_dir / "attempts.jsonl").write_text('{}\n{"hosts": ["n1", "n2"]}\n')
    if job:
        slurm.job_is("18", job)
    else:
        slurm.does_not_know("18")
    assert as_lines(run_dir, capsys) == [line]


def test_json_of_a_queued_run(run_dir: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    queue(run_dir, "17", "18", "18")
    slurm.job_is("18", "dependency")
    end = {"decision": "again", "why": "asked to stop; goes on from step 4"}
    (run_dir / "job" / "ends.jsonl").write_text(json.dumps(end) + "\n")
    fields = as_json(run_dir, capsys)
    assert (fields["state"], fields["step"], fields["attempts"]) == ("queued", 4, 2)
    assert fields["job_ids"] == ["17", "18"] and fields["why_it_waits"] == "Dependency"
    assert fields["what_follows"] == "again: asked to stop; goes on from step 4" and "stages" not in fields


def test_a_run_that_is_done_is_done_whatever_its_job_does(run_dir: Path, slurm: SlurmOnPath) -> None:
    finish(run_dir, 10)
    queue(run_dir, "17")
    slurm.job_is("17", "completing")
    assert run_status(run_dir, ended=None).state == "done"


@pytest.mark.parametrize("has_slurm", [True, False])
def test_a_queue_that_does_not_answer_is_a_warning_and_the_folder_speaks(
    has_slurm: bool, run_dir: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    queue(run_dir, "17")
    slurm.is_dead("17")
    if not has_slurm:
        monkeypatch.setenv("PATH", "/nowhere")
    assert print_status(run_dir, as_json=True) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["state"] == "stopped"
    why = (
        "Unable to contact slurm controller (connect failure)"
        if has_slurm
        else "Slurm's commands are not on this machine (halfstep doctor)"
    )
    assert shown.err.startswith("warning: scontrol") and shown.err.endswith(f"{why}; what follows is what the folder says\n")
    assert shown.err.count("warning") == 1


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three runs of 10 steps: one is done, one runs and one waits."""
    runs = [new_run(tmp_path / "sweep" / name, 10) for name in ("000_seed=1", "001_seed=2", "002_seed=3")]
    write_sweep(tmp_path / "sweep", runs)
    finish(runs[0], 10)
    for element, run in enumerate(runs):
        queue(run, f"17_{element}")
    return tmp_path / "sweep"


def test_a_sweep_has_a_line_a_run(sweep: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    slurm.does_not_know("17_0")
    slurm.job_is("17_1", "element running")
    slurm.job_is("17_2", "element of a waiting array")
    assert as_lines(sweep, capsys) == [
        "PATH/000_seed=1: done, step 10/10, job 17_0",
        "PATH/001_seed=2: running, step 0/10, job 17_1",
        "PATH/002_seed=3: queued, step 0/10, job 17_2 (Priority)",
    ]


@pytest.mark.parametrize(
    ("second", "third", "state"),
    [("element running", "element pending", "running"), ("failed", "element pending", "queued"), ("failed", "failed", "failed")],
)
def test_a_sweep_as_a_whole_is_what_goes_on_in_it(
    second: str, third: str, state: str, sweep: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm.does_not_know("17_0")
    slurm.job_is("17_1", second)
    slurm.job_is("17_2", third)
    for run in (sweep / "001_seed=2", sweep / "002_seed=3"):
        (run / "exit.json").write_text('{"code": 66, "reason": "loss is nan"}')
    fields = as_json(sweep, capsys)
    assert (fields["run_dir"], fields["state"], fields["step"], fields["total_steps"]) == (str(sweep), state, 10, 30)
    assert fields["job_ids"] == ["17_0", "17_1", "17_2"]
    stages = fields["stages"]
    assert isinstance(stages, list) and [stage["run_dir"] for stage in stages] == [str(path) for path in sorted(sweep.glob("0*"))]


def test_a_sweep_of_chains_has_a_line_a_chain(chain: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    folder = chain.parent
    other = new_run(folder / "other", 10)
    write_sweep(folder, [chain, other])
    queue(chain, "17_0")
    queue(other, "17_1")
    slurm.job_is("17_0", "element running")
    slurm.job_is("17_1", "element of a waiting array")
    assert as_lines(folder, capsys) == [
        "PATH/chain: running, step 10/30, job 17_0",
        "PATH/other: queued, step 0/10, job 17_1 (Priority)",
    ]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """A chain of three stages, the first of which is done."""
    folder = new_run(tmp_path / "chain", 10)
    names = ("stage_00", "stage_01", "stage_02")
    stages = [{"name": name, "steps": 2**number, "run_dir": name} for number, name in enumerate(names)]
    (folder / "chain.json").write_text(json.dumps({"schema_version": 1, "stages": stages}))
    for name in names:
        new_run(folder / name, 10)
    finish(folder / "stage_00", 10)
    return folder


@pytest.mark.parametrize(("job", "state"), [("running", "running"), ("pending", "queued"), ("requeued in held state", "held")])
def test_the_one_job_of_a_chain_is_at_its_first_stage_that_is_not_done(
    job: str, state: str, chain: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]
) -> None:
    queue(chain, "17")
    slurm.job_is("17", job)
    (chain / "stage_01" / "attempts.jsonl").write_text("{}\n")
    lines = [line.partition(" (")[0] for line in as_lines(chain, capsys)]
    assert lines == [
        "PATH/stage_00: done, step 10/10",
        f"PATH/stage_01: {state}, step 0/10, job 17",
        "PATH/stage_02: waiting, step 0/10",
    ]
    fields = as_json(chain, capsys)
    assert (fields["run_dir"], fields["state"], fields["step"], fields["job_ids"]) == (str(chain), state, 10, ["17"])


def test_a_chain_of_stage_jobs_says_what_each_waits_for(chain: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    for number, state in enumerate(("completed", "running", "dependency")):
        queue(chain / f"stage_0{number}", f"{17 + number}")
        slurm.job_is(f"{17 + number}", state)
    assert as_lines(chain, capsys) == [
        "PATH/stage_00: done, step 10/10, job 17",
        "PATH/stage_01: running, step 0/10, job 18",
        "PATH/stage_02: queued, step 0/10, job 19 (Dependency)",
    ]
    fields = as_json(chain, capsys)
    assert (fields["state"], fields["step"], fields["total_steps"], fields["job_ids"]) == ("running", 10, 30, ["17", "18", "19"])


def test_the_end_of_a_chain_is_that_of_the_stage_it_was_at(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_end(chain, End(75, "asked to stop"))
    assert as_lines(chain, capsys) == [
        "PATH/stage_00: done, step 10/10",
        "PATH/stage_01: stopped, step 0/10, last end: 75 asked to stop",
        "PATH/stage_02: waiting, step 0/10",
    ]


def test_a_chain_asks_a_dead_queue_once(chain: Path, slurm: SlurmOnPath, capsys: pytest.CaptureFixture[str]) -> None:
    """The real scontrol takes 18 s to say that nobody answers."""
    queue(chain, "17")
    slurm.is_dead("17")
    print_status(chain, as_json=True)
    shown = capsys.readouterr()
    assert shown.err.count("warning") == 1 and json.loads(shown.out)["state"] == "waiting"
    assert len((slurm.folder / "calls").read_text().splitlines()) == 1
