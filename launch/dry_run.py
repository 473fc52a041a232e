"""What a command would do, in full: every file that it would write and every command that it would run."""

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launch.chain import stage_names
from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster
from launch.job import Job, from_flags
from trainer.config import RunConfig
from trainer.config_io import dump_yaml

if TYPE_CHECKING:
    from launch.slurm import Planned


def dry_run_text(job: Job, config: RunConfig, machines: ClusterConfig) -> str:
    """Files with their contents and commands with their words, as text for people."""
    parts = [f"# would run on {_where(machines)} in {job.path}"]
    parts += _frozen(job.path, config, machines)
    parts += ["\n# --- commands", *_commands(job, config, machines)]
    return "\n".join(parts) + "\n"


def dry_run_sweep_text(folder: Path, jobs: Sequence[Job], configs: Sequence[RunConfig], machines: ClusterConfig) -> str:
    """The same of a sweep, whose runs are in `folder`."""
    parts = [f"# would run {len(jobs)} runs on {_where(machines)} in {folder}"]
    for job, config in zip(jobs, configs, strict=True):
        parts += _frozen(job.path, config, machines)
    parts.append("\n# --- commands")
    if isinstance(machines, SlurmCluster):
        from launch.slurm import plan_sweep

        planned = plan_sweep(folder, range(len(jobs)), machines, kind=jobs[0].kind, allow_fresh=bool(jobs[0].options["allow_fresh"]))
        parts += _slurm_jobs([planned], machines, first=jobs[0].path)
    else:
        for job, config in zip(jobs, configs, strict=True):
            parts += _commands(job, config, machines)
    return "\n".join(parts) + "\n"


def _frozen(run_dir: Path, config: RunConfig, machines: ClusterConfig) -> Iterator[str]:
    yield from _file(run_dir / "recipe.yaml", dump_yaml(config))
    if names := config.train.to_measure:
        yield f"# rank 0 measures {' and '.join(f'train.{name}' for name in names)} once before step 0, and freezes the choice here"
    yield from _file(run_dir / "cluster.yaml", dump_yaml(machines))


def _where(machines: ClusterConfig) -> str:
    match machines:
        case LocalCluster():
            return f"{machines.ranks} local rank{'' if machines.ranks == 1 else 's'}"
        case SlurmCluster():
            return f"Slurm, {machines.nodes} x {machines.ranks_per_node} ranks,"
        case RayCluster():
            return f"Ray, {machines.nodes} x {machines.ranks_per_node} ranks,"


def _file(path: Path, text: str) -> Iterator[str]:
    yield f"\n# --- {path}\n{text.rstrip()}"


def _commands(job: Job, config: RunConfig, machines: ClusterConfig) -> Iterator[str]:
    match machines:
        case LocalCluster():
            times = "" if machines.ranks == 1 else f"   # {machines.ranks} times, RANK=0 to {machines.ranks - 1}"
            yield f"{shlex.join(job.command(sys.executable))}{times}"
        case SlurmCluster():
            from launch.slurm import plan

            stages = [job.path / name for name in stage_names(config, config.distill)] if config.distill else []
            yield from _slurm_jobs(plan(job, machines, stages), machines)
        case RayCluster():
            yield shlex.join(job.command(machines.python or sys.executable)) + f"   # in each of {machines.ranks} workers of Ray Train"


def _slurm_jobs(jobs: Sequence["Planned"], machines: SlurmCluster, *, first: Path | None = None) -> Iterator[str]:
    """first: of a job array, the run of its first element."""
    from launch.slurm import submit_words
    from launch.slurm_job import srun_words
    from launch.slurm_script import render, template

    through = " through submitit" if machines.submit_with == "submitit" else ""
    for number, planned in enumerate(jobs):
        yield from _file(planned.path, render(template(), planned.script, machines))
        words = submit_words(planned, machines, after=f"JOB_{number}" if planned.waits else None)
        yield f"\n# --- submits job {number + 1}{through}\n{shlex.join(words)}"
        options: dict[str, object] = {**from_flags(planned.script.command), "previous_end": None}
        job = Job(planned.kind, Path(os.path.abspath(first or planned.run_dir)), options)
        where = f"in each of its {len(planned.script.array)} elements, here for the first" if first else "on its first node"
        yield f"# which runs {where}\n{shlex.join(srun_words(job, machines))}"
