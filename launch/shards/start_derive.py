"""From shards or a model to captions, latents or drawn images on running ranks: OUT checked, the request frozen, ranks started."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_shards.config import is_image
from data_shards.derive.request import (
    RUN_NAME,
    WORK_NAME,
    CaptionRequest,
    DeriveJob,
    DrawRequest,
    EncodeRequest,
    check_same,
    is_finished,
)
from data_shards.index import ShardIndex
from launch.cluster import ClusterConfig, LocalCluster, SlurmCluster, load_cluster
from launch.data import index_folder
from launch.job import Job
from launch.run_dir import write_surroundings
from launch.run_lock import locked
from launch.start import How, follow_queued, is_queued, launch_job
from trainer.exit_codes import DONE


@dataclass(frozen=True)
class Then:
    """What follows once OUT is whole."""

    sheet: Path | None = None
    """A contact sheet with captions, as .png."""
    push: str | None = None
    """A data set of the Hub that OUT is copied to."""


def start_derive(
    source: str,
    out: Path,
    request: CaptionRequest | EncodeRequest,
    how: How,
    *,
    overrides: Sequence[str] = (),
    then: Then | None = None,
) -> int:
    """Caption or encode shards into OUT, or go on with it; returns the ranks' exit code, 0 for a job that is queued.

    source: a folder of shards or a location. Raises: FetchError; ValueError for shards, a cluster or an OUT that cannot be used."""
    shards = index_folder(source, out / RUN_NAME / "shards")
    index = ShardIndex.load(shards)
    if out.resolve() == shards.resolve():
        raise ValueError(f"--out {out} is the folder of shards itself, which is never changed; give another --out")
    return _start(DeriveJob.of(index, request), out, how, overrides=overrides, then=then)


def start_draw(out: Path, request: DrawRequest, how: How, *, overrides: Sequence[str] = (), then: Then | None = None) -> int:
    """Draw images into OUT, or go on with it; returns the ranks' exit code, 0 for a job that is queued.

    Raises: ValueError for a source, a cluster or an OUT that cannot be used."""
    source = Path(request.source)
    if not any((source / name).is_file() for name in ("recipe.yaml", "chain.json", "model_index.json")):
        raise ValueError(f"{source}: neither a RUN_DIR (recipe.yaml), a chain (chain.json) nor an export (model_index.json); give one")
    return _start(DeriveJob.drawing(request), out, how, overrides=overrides, then=then)


def _start(job: DeriveJob, out: Path, how: How, *, overrides: Sequence[str], then: Then | None) -> int:
    run_dir = out / RUN_NAME
    machines = _machines(how, overrides)
    check_same(out, job.wanted())
    if not is_finished(out):
        if is_queued(run_dir, machines, how):
            return follow_queued(run_dir) if how.follow else DONE
        with locked(run_dir) as lock:
            _freeze(run_dir, job, machines)
            code = launch_job(Job(job.kind, run_dir, {}), machines, how, lock)
        if code != DONE:
            return code
    if not is_finished(out):  # a job in a queue
        if then and (then.sheet or then.push):
            sys.stderr.write(f"give the same command again when {run_dir} is done (halfstep status {run_dir}): the rest follows then\n")
        return DONE
    _follow_up(out, then or Then())
    return DONE


def _freeze(run_dir: Path, job: DeriveJob, machines: ClusterConfig) -> None:
    """Write what the ranks are to do; as long as none of them has begun, it may still change."""
    if (run_dir.parent / WORK_NAME / "wanted.json").exists():
        check_same(run_dir.parent, job.wanted())  # another command may have come first
    job.write(run_dir)
    write_surroundings(run_dir, machines)


def _machines(how: How, overrides: Sequence[str]) -> ClusterConfig:
    """The cluster, with what this Slurm job was given if it runs --here."""
    strange = next((text for text in overrides if not text.startswith("cluster.")), None)
    if strange is not None:
        raise ValueError(f"{strange}: only cluster.KEY=VALUE can be given here, such as cluster.nodes=2")
    changes = [text.removeprefix("cluster.") for text in overrides]
    machines = load_cluster(how.cluster, changes)
    if how.here:
        if not isinstance(machines, SlurmCluster):
            raise ValueError(f"--here runs on the nodes of a Slurm job, and --cluster {how.cluster} is of kind {machines.kind}")
        from launch.slurm_job import allocated

        machines = load_cluster(how.cluster, [*changes, *allocated()])
    if how.ranks is not None:
        if not isinstance(machines, LocalCluster):
            raise ValueError(f"--ranks {how.ranks} is for this machine; set cluster.nodes and cluster.ranks_per_node for {how.cluster}")
        machines = machines.model_copy(update={"ranks_per_node": how.ranks})
    return machines


def _follow_up(out: Path, then: Then) -> None:
    index = ShardIndex.load(out)
    done = index.derived[-1]
    left_out = f", {done['left_out']} samples left out" if done.get("left_out") else ""
    sys.stdout.write(f"{out}: {index.samples} samples in {len(index.shards)} shards{left_out}\n")
    counts = done.get("counts")
    for name, count in counts.items() if isinstance(counts, dict) else ():
        sys.stdout.write(f"  {name.replace('_', ' ')}: {count}\n")
    if then.sheet is not None:
        from data_shards.derive.sheet import write_caption_sheet

        write_caption_sheet(index, then.sheet)
        sys.stderr.write(f"contact sheet: {then.sheet}\n")
    if then.push is not None:
        from data_shards.hub.push import push_shards

        sys.stderr.write(f"pushed: {push_shards(out, then.push)}\n")
    if any(map(is_image, index.shards[0].members)):
        sys.stdout.write(f"use it:  halfstep train RECIPE data.shards={out}\n")


def local_model(text: str) -> str:
    """A model's folder as every host sees it; a Hub id as it is."""
    return os.path.abspath(text) if text and Path(text).exists() else text
