"""The runs of a sweep on Ray: side by side, as many at a time as the cluster has room for, driven by one process."""

import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from launch.cluster import RayCluster
from launch.ends import End, record_end
from launch.job import Job
from launch.ray_connect import check_installed
from launch.ray_train import Turns, address_of, drive_run, driver, own_job_id
from launch.status import is_done
from launch.sweep import sweep_runs
from trainer.exit_codes import DONE


def run_sweep_on_ray(folder: Path, jobs: Sequence[Job], cluster: RayCluster, *, follow: bool) -> tuple[int, bool]:
    """Run a sweep; the exit code of the first run that failed, and whether all are over: over http they are one queued job.

    Raises: as run_on_ray."""
    check_installed()
    sweep = Job("sweep", Path(os.path.abspath(folder)), {**jobs[0].options, "kind": jobs[0].kind})
    address = address_of(cluster)
    if address is None or not address.startswith(("http://", "https://")):
        return drive_sweep(sweep, cluster, address, name=None), True
    from launch.ray_jobs import submit

    submit(sweep, cluster, address)
    if not follow:
        return DONE, False
    from launch.queued import follow as follow_queued

    return follow_queued(sweep.path), True


def drive_sweep(sweep: Job, cluster: RayCluster, address: str | None, *, name: str | None) -> int:
    """Run what is not done of a sweep, each run in a thread of this driver. name: of the job that this driver is."""
    kind, options = str(sweep.options["kind"]), {key: value for key, value in sweep.options.items() if key != "kind"}
    jobs = [Job(kind, run, options) for run in sweep_runs(sweep.path) if not is_done(run)]
    if not jobs:
        sys.stderr.write(f"{sweep.path}: every run of the sweep is done\n")
        return DONE
    turns = Turns()
    with driver(address, cluster, [job.path for job in jobs]) as wait_seconds:
        job_id = name or own_job_id()
        with ThreadPoolExecutor(cluster.sweep_jobs_at_once or len(jobs), thread_name_prefix="run") as pool:
            running = [pool.submit(drive_run, job, cluster, job_id, wait_seconds=wait_seconds, turns=turns) for job in jobs]
            codes = [each.result() for each in running]
    failed = [(job, code) for job, code in zip(jobs, codes, strict=True) if code != DONE]
    if not failed:
        record_end(sweep.path, End(DONE, "done"))
        return DONE
    job, code = failed[0]
    names = ", ".join(job.path.name for job, _ in failed)
    record_end(sweep.path, End(code, f"{len(failed)} of {len(jobs)} runs are not done: {names} (halfstep status {job.path})"))
    return code
