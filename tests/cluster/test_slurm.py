"""One recipe on a real Slurm: the same run as on this machine, which comes back by itself."""

from pathlib import Path

import pytest

from launch.submitted import submissions
from tests.cluster.runs import Reference, SlurmRun, assert_same, halfstep, lines, preempt
from tests.cluster.slurm_cluster import Slurm
from tests.distributed.runs import RECIPE

pytestmark = pytest.mark.distributed

TWO_NODES = ("cluster.nodes=2", "cluster.exclusive=true")
LONG = ("train.steps=240", "logging.sample_every_steps=0", "checkpoint.every_steps=60")


def test_two_nodes_of_two_tasks_do_what_four_local_ranks_do(slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ("train", str(RECIPE), "--cluster", "slurm", "--run-dir", str(run_dir), "distill=null")
    words = (*words, f"data.shards={undisturbed.shards}", *TWO_NODES, "cluster.ranks_per_node=2", "--follow")
    done = halfstep(*words, environment=slurm.environment)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "step 24/24" in done.stdout, "--follow shows the job's log"
    assert_same(run_dir, undisturbed.of(4), with_hashes=True)
    (attempt,) = lines(run_dir / "attempts.jsonl")
    assert attempt["launcher"] == "slurm" and attempt["job_id"] == submissions(run_dir)[0].job_id


@pytest.mark.parametrize("transport", ["sbatch", "submitit"])
def test_a_preempted_job_comes_back_and_finishes_the_same_run(transport: str, slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    reference = undisturbed.of(2, *LONG)
    run = SlurmRun.submit(
        slurm, tmp_path / "run", f"data.shards={undisturbed.shards}", *LONG, *TWO_NODES, f"cluster.submit_with={transport}"
    )
    queued = run.again()
    assert queued.returncode == 0 and "nothing is submitted" in queued.stderr and len(submissions(run.run_dir)) == 1
    run.wait_for_step(30)
    preempt(slurm, run)
    run.finish()
    assert_same(run.run_dir, reference)
    assert [end["decision"] for end in run.ends()] == ["again", "done"]
