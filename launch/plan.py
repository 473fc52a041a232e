"""`halfstep plan`: what a run needs and costs, before it is submitted."""

import json
import os
from collections.abc import Sequence

from launch.chain import with_teacher
from launch.cluster import ClusterConfig, LocalCluster, SlurmCluster, load_cluster
from launch.job import Job
from launch.local import run_job
from launch.models import is_hub_id
from launch.start import check_engine, check_ranks
from trainer.config import RunConfig
from trainer.config_io import load_recipe, recipe_path


def print_plan(recipe: str, overrides: Sequence[str], *, cluster: str, ranks: int | None, gpu: str | None, as_json: bool) -> int:
    """Print the plan of a recipe on a cluster; returns the worker's exit code.

    overrides: KEY=VALUE words, those of the cluster with `cluster.` in front. ranks: instead of the cluster file's, on one node.
    gpu: a name of configs/prices.yaml; None: the cluster file's gpu_type, if it has one.
    Raises: ValueError, RecipeErrors for a recipe, a cluster file or a number of ranks that `halfstep train` would refuse too."""
    own = [text for text in overrides if not text.startswith("cluster.")]
    path = recipe_path(recipe)
    config = load_recipe(path, own)
    own += _of_teacher(config)
    machines = load_cluster(cluster, [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")])
    world_size = ranks or machines.ranks
    check_ranks(config.data, world_size)
    check_engine(config, world_size)
    gpu = gpu or (machines.gpu_type if isinstance(machines, SlurmCluster) else None)
    on_gpu = gpu is not None or (not isinstance(machines, LocalCluster) and machines.gpus_per_rank > 0)
    options: dict[str, object] = {
        "overrides": own,
        "world_size": world_size,
        "ranks_per_node": ranks or machines.ranks_per_node,
        "on_gpu": on_gpu,
        "gpu": gpu,
        "json": as_json,
        "title": _title(path.stem, config, machines, ranks=ranks),
    }
    here = LocalCluster(threads_per_rank=max(1, os.cpu_count() or 1))
    return run_job(Job("plan", path, options), here, ranks=1)


def _of_teacher(config: RunConfig) -> list[str]:
    """The words that give a halving's recipe the sections that its teacher decides, where it takes one.

    Raises: ValueError if the teacher is not there, and the recipe does not say what it will be."""
    teacher = config.distill and config.distill.teacher
    if teacher is None:
        return []
    if os.path.exists(teacher) or is_hub_id(teacher):
        taken = with_teacher(config, teacher).model_dump(mode="json")
        return [f"{section}={json.dumps(taken[section])}" for section in ("model", "noise_schedule", "objective")]
    if "model" not in config.model_fields_set:
        raise ValueError(
            f"distill.teacher={teacher}: not there, so its network is not known; train it first, or say what it will be, "
            "such as model='{kind: ddpm, base: google/ddpm-celebahq-256}'"
        )
    return []


def _title(name: str, config: RunConfig, machines: ClusterConfig, *, ranks: int | None) -> str:
    """The line above the page: recipe, machines, engine."""
    if ranks or isinstance(machines, LocalCluster):
        count = ranks or machines.ranks
        where = f"{count} local rank{'' if count == 1 else 's'}"
    else:
        where = f"{machines.kind}, {machines.nodes} x {machines.ranks_per_node} ranks"
    engine = config.engine
    kind = f"deepspeed ZeRO-{engine.zero_stage}" if engine.kind == "deepspeed" else engine.kind
    again = ", activation checkpointing" if config.train.activation_checkpointing else ""
    counted = {"compile": "eager", "memory_format": "contiguous"}
    open_ = "".join(f", {counted[name]} (train.{name}=auto is measured before step 0)" for name in config.train.to_measure)
    return f"Plan of {name} on {where}: engine {kind}, {engine.precision}{again}{open_}"
