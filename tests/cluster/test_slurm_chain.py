"""A chain of halvings 16, 8, 4 through a real Slurm, preempted once in each stage: each stage finishes exactly once."""

from pathlib import Path

import pytest

from launch.submitted import submissions
from tests.cluster.runs import RECIPE, SlurmRun, assert_same, halfstep, lines, logged_steps, preempt
from tests.cluster.slurm_cluster import Slurm

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]

CHAIN = ("distill.start_steps=16", "distill.end_steps=4", "distill.updates=200", "train.steps=200", "logging.sample_every_steps=0")
CHAIN += ("checkpoint.every_steps=50", "distill.checkpoint_every_steps=50")
STAGES = ("stage_00_1000_steps", "stage_01_0008_steps", "stage_02_0004_steps")
TWO_NODES = ("cluster.nodes=2", "cluster.exclusive=true")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    """The chain on this machine's ranks, undisturbed."""
    folder = tmp_path_factory.mktemp("chain") / "chain"
    done = halfstep("distill", RECIPE, "--run-dir", folder, "--ranks", "2", f"data.shards={shards}", *CHAIN)
    assert done.returncode == 0, done.stderr
    return folder


def test_one_job(slurm: Slurm, shards: Path, reference: Path, tmp_path: Path) -> None:
    run = SlurmRun.submit(slurm, tmp_path / "chain", f"data.shards={shards}", *CHAIN, *TWO_NODES, verb="distill")
    for stage in STAGES:
        slurm.wait_until(run.job_id, lambda stage=stage: logged_steps(run.run_dir / stage) >= 20, f"{stage} to run", seconds=300)
        preempt(slurm, run)
    run.finish()
    _each_finished_once(run, reference)
    assert [end["decision"] for end in run.ends()] == ["again"] * 3 + ["done"]
    assert len(submissions(run.run_dir)) == 1


def test_dependent_jobs(slurm: Slurm, shards: Path, reference: Path, tmp_path: Path) -> None:
    overrides = (f"data.shards={shards}", *CHAIN, *TWO_NODES, "cluster.chain=dependent_jobs")
    run = SlurmRun.submit(slurm, tmp_path / "chain", *overrides, verb="distill")
    again = run.again()
    assert again.returncode == 0 and again.stderr.count("nothing is submitted") == 3, again.stderr
    for stage in STAGES:
        job = SlurmRun(slurm, run.run_dir / stage, run.words)
        slurm.wait_until(job.job_id, lambda job=job: logged_steps(job.run_dir) >= 20, f"{stage} to run", seconds=300)
        preempt(slurm, job)
        job.finish()
        assert [end["decision"] for end in job.ends()] == ["again", "done"] and len(submissions(job.run_dir)) == 1
    _each_finished_once(run, reference)


def test_a_stage_that_stops_takes_those_that_wait_for_it_with_it(slurm: Slurm, shards: Path, tmp_path: Path) -> None:
    overrides = (f"data.shards={shards}", *CHAIN, "cluster.chain=dependent_jobs", "optim.learning_rate=1e30")
    run = SlurmRun.submit(slurm, tmp_path / "chain", *overrides, verb="distill")
    jobs = [SlurmRun(slurm, run.run_dir / stage, run.words) for stage in STAGES]
    assert jobs[0].wait_for("COMPLETED", "FAILED") == "FAILED" and jobs[0].ends()[-1]["code"] == 66
    for job in jobs[1:]:
        assert job.wait_for("CANCELLED", "COMPLETED", "RUNNING") == "CANCELLED"
    status = halfstep("status", run.run_dir, environment=slurm.environment).stdout
    assert "failed" in status.splitlines()[0] and "NumericError" in status


def _each_finished_once(run: SlurmRun, reference: Path) -> None:
    for stage in STAGES:
        assert_same(run.run_dir / stage, reference / stage, with_hashes=True)
        assert len(lines(run.run_dir / stage / "attempts.jsonl")) == 2, "begun once, preempted once"
        assert (run.run_dir / stage / "export" / "model_index.json").exists()
