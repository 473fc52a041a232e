"""Everything that takes a job's nodes away on a real Slurm, again and again: it comes back and finishes the same run."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.runs import Reference, SlurmRun, assert_same, lines, logged_steps, preempt
from tests.cluster.slurm_cluster import Host, Slurm, rank_pids

pytestmark = [pytest.mark.distributed, pytest.mark.cluster]

LONG = ("train.steps=240", "logging.sample_every_steps=0", "checkpoint.every_steps=20")
TWO_NODES = ("cluster.nodes=2", "cluster.exclusive=true")
MOMENTS = [0, 1, 7, 19, 20, 21, 40, 75, 110, 150]
"""Steps that are logged when the high-priority job comes; 0 is while the ranks start. Every 20 steps there is a save."""


def submit(slurm: Slurm, run_dir: Path, undisturbed: Reference, *overrides: str) -> SlurmRun:
    return SlurmRun.submit(slurm, run_dir, f"data.shards={undisturbed.shards}", *LONG, *TWO_NODES, *overrides)


@pytest.mark.parametrize("transport", ["sbatch", "submitit"])
@pytest.mark.parametrize("step", MOMENTS)
def test_preempted(step: int, transport: str, slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    reference = undisturbed.of(2, *LONG)
    run = submit(slurm, tmp_path / "run", undisturbed, f"cluster.submit_with={transport}")
    if step == 0:
        slurm.wait_until(run.job_id, lambda: bool(rank_pids(run.run_dir)), "the ranks to start")
    run.wait_for_step(step)
    preempt(slurm, run)
    run.finish()
    assert_same(run.run_dir, reference)
    assert run.ends()[-1]["decision"] == "done" and [end["decision"] for end in run.ends()].count("done") == 1


@pytest.fixture(scope="module")
def slurm_of_signals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A site where preemption sends the job's own signal (preempt_send_user_signal), and no time to spare."""
    cluster = Slurm(tmp_path_factory.mktemp("slurm_of_signals"), [Host("n1"), Host("n2")], grace_seconds=15, user_signal=True)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("transport", ["sbatch", "submitit"])
def test_preempted_where_the_site_sends_the_jobs_own_signal(
    transport: str, slurm_of_signals: Slurm, undisturbed: Reference, tmp_path: Path
) -> None:
    reference = undisturbed.of(2, *LONG)
    run = submit(slurm_of_signals, tmp_path / "run", undisturbed, f"cluster.submit_with={transport}")
    run.wait_for_step(30)
    preempt(slurm_of_signals, run)
    run.finish()
    assert_same(run.run_dir, reference)
    assert [end["code"] for end in run.ends()] == [75, 0]


def test_five_time_limits_in_a_row_each_advance(slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    limits = ("cluster.time_limit_minutes=1", "cluster.stop_seconds_before_limit=30")
    run = submit(slurm, tmp_path / "run", undisturbed, "train.steps=100000", *limits)
    slurm.wait_until(run.job_id, lambda: len(run.ends()) >= 5, "five segments", seconds=600)
    slurm.run("scancel", run.job_id)
    steps = [int(str(end["committed_steps"])) for end in run.ends()[:5]]
    assert steps == sorted(set(steps)) and steps[0] > 0, f"each segment comes further: {steps}"
    assert [end["code"] for end in run.ends()[:5]] == [75] * 5
    assert {attempt["step"] for attempt in lines(run.run_dir / "attempts.jsonl")} >= {0, *steps[:4]}


@pytest.mark.parametrize("step", [3, 30, 120])
def test_scontrol_requeue(step: int, slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    reference = undisturbed.of(2, *LONG)
    run = submit(slurm, tmp_path / "run", undisturbed)
    run.wait_for_step(step)
    slurm.run("scontrol", "requeue", run.job_id)
    slurm.wait_until(run.job_id, lambda: slurm.facts(run.job_id)["Restarts"] == "1", "the job to be queued again")
    run.finish()
    assert_same(run.run_dir, reference)


@pytest.mark.parametrize("node", ["n1", "n2", "n1"])
def test_a_node_dies_with_its_tasks(node: str, slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    """n1 is where the batch step and rank 0 run, so that nobody is left to decide anything."""
    reference = undisturbed.of(2, *LONG)
    run = submit(slurm, tmp_path / "run", undisturbed)
    run.wait_for_step(45)
    slurm.kill_node(node)
    try:
        slurm.wait_until(run.job_id, lambda: slurm.facts(run.job_id)["Restarts"] != "0", "the job to be queued again")
    finally:
        slurm.start_node(node)
    slurm.wait_for_nodes()
    run.finish()
    assert_same(run.run_dir, reference)
    assert min(step for step in _starts(run) if step) >= 40, "it goes on from a checkpoint"


@pytest.mark.parametrize("repeat", range(3))
def test_a_killed_rank(repeat: int, slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    reference = undisturbed.of(2, *LONG)
    run = submit(slurm, tmp_path / "run", undisturbed)
    run.wait_for_step(25 + 20 * repeat)
    os.kill(rank_pids(run.run_dir)[repeat % 2], signal.SIGKILL)
    run.finish()
    assert_same(run.run_dir, reference)
    assert [end["code"] for end in run.ends()] == [70, 0]


def test_the_same_run_goes_on_under_another_launcher(slurm: Slurm, undisturbed: Reference, tmp_path: Path) -> None:
    """From Slurm to this machine: cluster and launcher are no part of a run's identity."""
    from tests.cluster.runs import halfstep

    reference = undisturbed.of(2, *LONG)
    run = submit(slurm, tmp_path / "run", undisturbed)
    run.wait_for_step(30)
    halfstep("stop", run.run_dir, environment=slurm.environment)
    assert 30 <= logged_steps(run.run_dir) < 240
    words = [word for word in run.words if not word.startswith("cluster.")]
    words[words.index("--cluster") : words.index("--cluster") + 2] = ["--ranks", "2"]
    done = halfstep(*words)
    assert done.returncode == 0, done.stderr
    assert_same(run.run_dir, reference)
    assert [attempt["launcher"] for attempt in lines(run.run_dir / "attempts.jsonl")] == ["slurm", "local"]


def _starts(run: SlurmRun) -> list[int]:
    return [int(str(attempt["step"])) for attempt in lines(run.run_dir / "attempts.jsonl")]
