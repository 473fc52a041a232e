"""Slurm from the submit host: job scripts are written into RUN_DIR/job and handed to sbatch, or to submitit."""

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

from data_shards.files import replace_file
from launch.cluster import SlurmCluster
from launch.job import Job, as_flags
from launch.run_dir import write_surroundings
from launch.slurm_commands import slurm
from launch.slurm_script import Script, render, sbatch_options, template
from launch.status import is_done
from launch.submitted import Submission, record_submission
from launch.sweep import sweep_runs
from trainer.chain import read_chain


@final
@dataclass(frozen=True)
class Planned:
    """A job to be queued: its folder, its script, and whether it waits for the one before."""

    kind: str
    """Of the ranks' job: train or distill."""
    run_dir: Path
    script: Script
    waits: bool = False

    @property
    def path(self) -> Path:
        """Where the job script goes."""
        return self.run_dir / "job" / "train.sbatch"


def submit(job: Job, cluster: SlurmCluster) -> None:
    """Queue a run, or a chain as its cluster file says, and write down the ids of the jobs.

    Raises: RuntimeError with Slurm's own words; ValueError where Slurm is not installed."""
    if is_done(job.path):
        sys.stderr.write(f"{job.path}: is done; nothing is submitted\n")
        return
    before: str | None = None
    for planned in plan(job, cluster, _stages_to_train(job.path)):
        planned.path.parent.mkdir(mode=0o700, exist_ok=True)
        if planned.run_dir != Path(os.path.abspath(job.path)):
            write_surroundings(planned.run_dir, cluster)
        replace_file(planned.path, render(template(), planned.script, cluster))
        job_id = _queue(planned, cluster, after=before if planned.waits else None)
        output = planned.script.output.replace("%j", job_id).replace("%A", job_id)
        record_submission(planned.run_dir, Submission("slurm", job_id, output))
        before = job_id
        sys.stderr.write(f"queued as job {job_id}: {planned.run_dir}\n")
    sys.stderr.write(f"  halfstep status {job.path}      halfstep logs {job.path} --follow      halfstep stop {job.path}\n")


def submit_sweep(folder: Path, cluster: SlurmCluster, *, kind: str, allow_fresh: bool) -> None:
    """Queue the runs of a sweep that are not done as one job array; kind: train or distill.

    Raises: as submit."""
    todo = [number for number, run in enumerate(sweep_runs(folder)) if not is_done(run)]
    planned = plan_sweep(folder, todo, cluster, kind=kind, allow_fresh=allow_fresh)
    if not planned.script.array:
        sys.stderr.write(f"{folder}: every run of the sweep is done\n")
        return
    planned.path.parent.mkdir(mode=0o700, exist_ok=True)
    replace_file(planned.path, render(template(), planned.script, cluster))
    job_id = _queue(planned, cluster, after=None)
    for element in planned.script.array:
        output = f"../{planned.script.output}".replace("%A", job_id).replace("%a", str(element))
        record_submission(sweep_runs(folder)[element], Submission("slurm", f"{job_id}_{element}", output))
    sys.stderr.write(f"queued as job array {job_id}: {len(planned.script.array)} runs of {folder}\n  halfstep status {folder}\n")


def plan_sweep(folder: Path, elements: Sequence[int], cluster: SlurmCluster, *, kind: str = "train", allow_fresh: bool) -> Planned:
    """The job array of a sweep: each element looks its run up, a chain runs in one element."""
    path = Path(os.path.abspath(folder))
    command = [*_command(kind, path, Job(kind, path, {"allow_fresh": allow_fresh}), cluster), "--array"]
    return Planned(kind, path, Script(_name(path), path, command, tuple(elements)))


def plan(job: Job, cluster: SlurmCluster, stages: Sequence[Path]) -> list[Planned]:
    """The jobs that a run needs: one, or for a chain by choice one for each of its `stages` that is still to be trained."""
    if job.kind == "distill" and cluster.chain == "dependent_jobs":
        return [_planned("train", stage, job, cluster, waits=number > 0) for number, stage in enumerate(stages)]
    return [_planned(job.kind, job.path, job, cluster, waits=False)]


def _planned(kind: str, folder: Path, job: Job, cluster: SlurmCluster, *, waits: bool) -> Planned:
    path = Path(os.path.abspath(folder))
    name = _name(path) if kind == job.kind else _name(path.parent, path.name)
    return Planned(kind, path, Script(name, path, _command(kind, path, job, cluster)), waits=waits)


def _stages_to_train(chain_dir: Path) -> list[Path]:
    if not (chain_dir / "chain.json").exists():
        return []
    return [stage.run_dir for stage in read_chain(chain_dir) if stage.trained_here and not is_done(stage.run_dir)]


def submit_words(planned: Planned, cluster: SlurmCluster, *, after: str | None) -> list[str]:
    """The command that queues a job script. after: the job that must have finished well."""
    dependency = [f"--dependency=afterok:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *dependency, str(planned.path)]


def _queue(planned: Planned, cluster: SlurmCluster, *, after: str | None) -> str:
    if cluster.submit_with == "submitit":
        return _queue_through_submitit(planned, cluster, after=after)
    return slurm(submit_words(planned, cluster, after=after)).strip().split(";")[0]


def _queue_through_submitit(planned: Planned, cluster: SlurmCluster, *, after: str | None) -> str:
    """submitit as a transport: its pickle holds subprocess.check_call and a list of words, and no code or state of ours."""
    try:
        from submitit import SlurmExecutor
    except ImportError:
        raise ValueError("cluster.submit_with=submitit, but submitit is not installed; pip install 'halfstep[slurm]'") from None
    options: dict[str, str | bool] = {
        name: True if value is None else value for name, value in sbatch_options(planned.script, cluster).items()
    }
    # submitit starts Python as a child of the batch shell, which a signal of its own would end; the tasks take it themselves.
    options["signal"] = options["signal"].removeprefix("B:") if isinstance(options["signal"], str) else True
    if after:
        options |= {"dependency": f"afterok:{after}", "kill-on-invalid-dep": "yes"}
    for line in cluster.extra_sbatch_lines:
        name, _, value = line.removeprefix("#SBATCH ").lstrip("-").partition("=")
        options[name] = value or True
    folder = planned.run_dir / "job" / "submitit"
    folder.mkdir(mode=0o700, exist_ok=True)
    executor = SlurmExecutor(folder, python=f"exec {shlex.quote(cluster.python or sys.executable)}")
    # What submitit would choose by itself (five minutes, a wckey) is left out.
    own = {"job_name": None, "time": None, "wckey": None}
    executor.update_parameters(**own, stderr_to_stdout=True, use_srun=False, setup=list(cluster.setup), additional_parameters=options)
    return executor.submit(subprocess.check_call, list(planned.script.command)).job_id


def _command(kind: str, path: Path, job: Job, cluster: SlurmCluster) -> list[str]:
    return [cluster.python or sys.executable, "-m", "launch.slurm_job", kind, str(path), *as_flags(job.options)]


def _name(path: Path, *stage: str) -> str:
    """A job's name, as squeue lists it."""
    return "halfstep-" + re.sub(r"[^A-Za-z0-9._-]", "_", "-".join([path.name, *stage]))
