"""What a command would do, in full: every file that it would write and every command that it would run."""

import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from launch.chain import stage_names
from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster
from launch.job import Job
from trainer.config import RunConfig
from trainer.config_io import dump_yaml


def dry_run_text(job: Job, config: RunConfig, machines: ClusterConfig) -> str:
    """Files with their contents and commands with their words, as text for people."""
    parts = [f"# would run on {_where(machines)} in {job.path}"]
    parts += _file(job.path / "recipe.yaml", dump_yaml(config))
    parts += _file(job.path / "cluster.yaml", dump_yaml(machines))
    parts += _commands(job, config, machines)
    return "\n".join(parts) + "\n"


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
    yield "\n# --- commands"
    match machines:
        case LocalCluster():
            yield f"{shlex.join(job.command(sys.executable))}   # {machines.ranks} times, RANK=0 to {machines.ranks - 1}"
        case SlurmCluster():
            yield from _slurm_jobs(job, config, machines)
        case RayCluster():
            yield shlex.join(job.command(machines.python or sys.executable)) + f"   # in each of {machines.ranks} workers of Ray Train"


def _slurm_jobs(job: Job, config: RunConfig, machines: SlurmCluster) -> Iterator[str]:
    from launch.slurm import plan, submit_words
    from launch.slurm_job import srun_words
    from launch.slurm_script import render, template

    stages = [job.path / name for name in stage_names(config, config.distill)] if config.distill else []
    for number, planned in enumerate(plan(job, machines, stages)):
        yield from _file(planned.path, render(template(), planned.script, machines))
        after = f"JOB_{number}" if planned.waits else None
        yield f"\n# submits job {number + 1}{' through submitit' if machines.submit_with == 'submitit' else ''}\n" + shlex.join(
            submit_words(planned, machines, after=after)
        )
        yield f"# which runs on its first node\n{shlex.join(srun_words(job, machines))}"
