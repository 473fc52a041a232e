"""A run for each combination of some values: on Slurm a job array, on Ray side by side, here one after the other; then one report."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import final

from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster
from launch.dry_run import dry_run_sweep_text
from launch.ends import committed_steps
from launch.job import Job
from launch.local import run_job
from launch.run_dir import write_surroundings
from launch.run_lock import locked
from launch.start import (
    How,
    chain_config,
    follow_queued,
    freeze_chain_run,
    freeze_run,
    is_queued,
    launch_job,
    prepare,
    warn_of_shared_shards,
)
from launch.sweep import combinations, run_name, sweep_runs, write_sweep
from trainer.config import PixelModelConfig, RunConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.exit_codes import CALL_AGAIN, DONE, INTERRUPTED

REPORT = "report.html"


@final
@dataclass(frozen=True)
class Quality:
    """What every run of a sweep is measured with when it is done."""

    reference: Path
    """Shards of images that no run was trained on."""
    steps: Sequence[int] | None = None
    """Step counts; None for those that a run's models were made for, as `halfstep evaluate`."""
    images: int | None = None
    """Per step count; None for evaluate's own."""


def start_sweep(recipe: str, overrides: Sequence[str], how: How, *, chains: bool = False, quality: Quality | None = None) -> int:
    """Train a recipe once for each combination of some values, and write one report of them once they are done.

    chains: a recipe with a distill section is a chain of halvings, as `halfstep distill` runs it; without it the teacher alone.
    Returns the exit code of the first run that failed, 0 for runs that are queued. Raises: ValueError as start_train and
    start_distill, before anything starts."""
    choices = combinations(how.sweep)
    if how.run_dir is None and chains:
        how = replace(how, run_dir=Path("runs") / f"{recipe_path(recipe).stem}_sweep")
    prepared = [prepare(recipe, [*overrides, *chosen], how) for chosen in choices]
    machines, folder = prepared[0][1:]
    kind = "distill" if chains and prepared[0][0].distill else "train"
    configs = [config if kind == "train" else chain_config(recipe, config, machines) for config, _, _ in prepared]
    runs = [folder / run_name(number, chosen) for number, chosen in enumerate(choices)]
    jobs = [Job(kind, run, {"allow_fresh": how.allow_fresh}) for run in runs]
    if how.dry_run:
        sys.stdout.write(dry_run_sweep_text(folder, jobs, configs, machines))
        return DONE
    if (folder / "recipe.yaml").exists():
        raise ValueError(f"{folder}: holds a {'chain' if (folder / 'chain.json').exists() else 'run'}; give --sweep another --run-dir")
    if is_queued(folder, machines, how):
        return follow_queued(folder) if how.follow else DONE
    with locked(folder) as lock:
        write_sweep(folder, runs)
        write_surroundings(folder, machines)
        warn_of_shared_shards(_freeze(folder, jobs, configs, machines), machines)
        code, over = _launch(folder, jobs, configs, machines, how, lock)
    if not over:
        sys.stderr.write(f"to compare its runs:  halfstep report {folder} --out {folder / REPORT}\n")
        return code
    told = report_sweep(folder, quality)
    return code or told


def report_sweep(folder: Path, quality: Quality | None) -> int:
    """Measure the pixel models of a sweep, where asked to, and write one report of all runs, those that failed too.

    Returns the exit code of what failed first."""
    runs, codes = sweep_runs(folder), list[int]()
    machines = LocalCluster(threads_per_rank=os.cpu_count() or 1)
    for run in runs if quality else ():
        assert quality is not None, "the loop's own condition"
        if committed_steps(run) and isinstance(load_recipe(run / "recipe.yaml", ()).model, PixelModelConfig):
            options: dict[str, object] = {
                "reference": str(quality.reference),
                "steps": quality.steps,
                "out": str(run / "evaluation.json"),
                "cache": str(folder / "evaluation_cache"),
                **({} if quality.images is None else {"images": quality.images}),
            }
            codes.append(run_job(Job("evaluate", run, options), machines, ranks=1))
    out = folder / REPORT
    options = {"dirs": [str(run) for run in runs], "out": str(out), "title": folder.resolve().name}
    codes.append(run_job(Job("report", folder, options), machines, ranks=1))
    if codes[-1] == DONE:
        sys.stdout.write(f"{folder}: {len(runs)} runs, compared in {out}\n")
    return next((code for code in codes if code != DONE), DONE)


def _freeze(folder: Path, jobs: Sequence[Job], configs: Sequence[RunConfig], machines: ClusterConfig) -> list[Path]:
    """Make every RUN_DIR ready; faces that all runs share are packed once. Returns the folders of the first one's indexes."""
    shared = folder / "shards" if all(config.data == configs[0].data for config in configs) else None
    packed = []
    for job, config in zip(jobs, configs, strict=True):
        freeze = freeze_run if job.kind == "train" else freeze_chain_run
        packed.append(freeze(job.path, config, machines, shards_in=shared or job.path / "shards"))
    return packed[0]


def _launch(
    folder: Path, jobs: Sequence[Job], configs: Sequence[RunConfig], machines: ClusterConfig, how: How, lock: int
) -> tuple[int, bool]:
    """Start the runs; the exit code of the first that failed, and whether all are over: others are queued, or were stopped."""
    if isinstance(machines, SlurmCluster) and not how.here:
        from launch.slurm import submit_sweep

        submit_sweep(folder, machines, kind=jobs[0].kind, allow_fresh=how.allow_fresh)
        return (follow_queued(folder), True) if how.follow else (DONE, False)
    if isinstance(machines, RayCluster):
        from launch.ray_sweep import run_sweep_on_ray

        return run_sweep_on_ray(folder, jobs, machines, follow=how.follow)
    codes = []
    for job, config in zip(jobs, configs, strict=True):
        code = launch_job(job, machines, how, lock)
        codes.append(code)
        limited = config.train.stop_after_steps is not None or config.train.stop_after_minutes is not None
        if code == INTERRUPTED or (code == CALL_AGAIN and not limited):  # somebody asked: the other runs are not started
            return code, False
    return next((code for code in codes if code != DONE), DONE), True
