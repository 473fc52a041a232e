"""From a recipe to running ranks: shards packed where the recipe asks for it, folders frozen, ranks started."""

import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from launch.chain import freeze_chain, with_teacher
from launch.cluster import ClusterConfig, load_cluster
from launch.local import Job, run_job
from launch.run_dir import freeze, write_surroundings
from launch.run_lock import locked
from launch.shards import pack_source
from trainer.config import FacesConfig, ProgressiveDistillationConfig, RunConfig
from trainer.config_io import dump_yaml, load_recipe, recipe_path


def start_train(
    recipe: str,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    cluster: str,
    ranks: int | None,
    dry_run: bool = False,
    allow_fresh: bool = False,
) -> int:
    """Train a recipe, or resume it where RUN_DIR holds its run; returns the run's exit code.

    ranks: of a local run; None takes the cluster file's. allow_fresh: start over where no checkpoint of the run is left whole.
    Raises: ValueError for a recipe, data or folder that cannot be used."""
    config, machines, folder, count = _prepare(recipe, overrides, run_dir=run_dir, cluster=cluster, ranks=ranks)
    if dry_run:
        return _show(config, folder, count)
    if (folder / "chain.json").exists():
        raise ValueError(f"{folder}: holds a chain of halvings; go on with `halfstep distill`, or give another --run-dir")
    with locked(folder) as lock:
        shards = _shards(config, folder)
        seen = "shards" if config.data.shards is None else str(shards)
        config = config.model_copy(update={"data": config.data.model_copy(update={"shards": seen})})
        freeze(folder, _with_absolute_teacher(config), shards=shards)
        write_surroundings(folder, machines)
        return run_job(Job("train", folder, {"allow_fresh": allow_fresh}), machines, ranks=count, run_dir=folder, lock=lock)


def start_distill(
    recipe: str,
    overrides: Sequence[str],
    *,
    run_dir: Path | None,
    cluster: str,
    ranks: int | None,
    dry_run: bool = False,
    allow_fresh: bool = False,
) -> int:
    """Run a chain of halvings, or go on with it; returns the exit code of the stage that ended it, 0 when all are done.

    ranks, allow_fresh: as in start_train.
    Raises: ValueError for a recipe, teacher, data or folder that cannot be used."""
    config, machines, folder, count = _prepare(recipe, overrides, run_dir=run_dir, cluster=cluster, ranks=ranks)
    distill = config.distill
    if distill is None:
        raise ValueError(f"{recipe_path(recipe)}: has no distill section; add one (halfstep recipes demo shows it) or use `halfstep train`")
    if distill.teacher is not None:
        config = with_teacher(config, Path(distill.teacher))
    if dry_run:
        return _show(config, folder, count)
    if (folder / "metrics.jsonl").exists():
        raise ValueError(f"{folder}: holds a single run; halve it with distill.teacher={folder} and another --run-dir")
    check_ranks(config, count, batch=distill.global_batch_size)
    with locked(folder) as lock:
        shards = _shards(config, folder)
        freeze_chain(folder, config, distill, shards=shards)
        write_surroundings(folder, machines)
        return run_job(Job("distill", folder, {"allow_fresh": allow_fresh}), machines, ranks=count, run_dir=folder, lock=lock)


def _prepare(
    recipe: str, overrides: Sequence[str], *, run_dir: Path | None, cluster: str, ranks: int | None
) -> tuple[RunConfig, ClusterConfig, Path, int]:
    """Recipe, cluster, RUN_DIR and number of ranks, checked against each other."""
    own = [text for text in overrides if not text.startswith("cluster.")]
    config = load_recipe(recipe_path(recipe), own)
    machines = load_cluster(cluster, [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")])
    count = ranks or machines.ranks_per_node
    check_ranks(config, count)
    check_engine(config, count)
    return config, machines, run_dir or Path("runs") / recipe_path(recipe).stem, count


def check_ranks(config: RunConfig, ranks: int, *, batch: int | None = None) -> None:
    """Raises: ValueError if so many ranks cannot divide the micro-batches of a global batch (the recipe's, or `batch`)."""
    images = batch or config.data.global_batch_size
    count = images // config.data.micro_batch_size
    if count % ranks:
        raise ValueError(
            f"{ranks} ranks cannot divide {count} micro-batches (global batch {images} / data.micro_batch_size="
            f"{config.data.micro_batch_size}); give --ranks a divisor of {count}, or change data.micro_batch_size"
        )


def check_engine(config: RunConfig, ranks: int) -> None:
    """Raises: ValueError if the recipe's engine does not fit the ranks, or wants a package that is not installed here."""
    engine = config.engine
    if ranks % engine.replicas:
        raise ValueError(
            f"{ranks} ranks cannot hold engine.replicas={engine.replicas} copies of the model: each copy takes as many ranks; "
            f"give --ranks a multiple of {engine.replicas}, or set engine.replicas to a divisor of {ranks}"
        )
    if engine.kind == "deepspeed" and find_spec("deepspeed") is None:
        raise ValueError(
            "engine.kind=deepspeed, but DeepSpeed is not installed; pip install 'halfstep[deepspeed]', or set engine.kind=fsdp: "
            "it shares the same state with PyTorch alone"
        )
    if engine.attention == "xformers" and find_spec("xformers") is None:
        raise ValueError(
            "engine.attention=xformers, but xformers is not installed; pip install 'halfstep[xformers]', or set engine.attention=auto"
        )
    if engine.attention == "xformers" and engine.deterministic:
        raise ValueError(
            "engine.attention=xformers, but its backward pass does not give the same bits every time, as engine.deterministic=true wants; "
            "set engine.attention=sdpa"
        )


def _with_absolute_teacher(config: RunConfig) -> RunConfig:
    """A teacher's path as the user's directory sees it, for ranks that look from RUN_DIR."""
    if not isinstance(config.objective, ProgressiveDistillationConfig):
        return config
    teacher = os.path.abspath(config.objective.teacher)
    return config.model_copy(update={"objective": config.objective.model_copy(update={"teacher": teacher})})


def _shards(config: RunConfig, run_dir: Path) -> Path:
    """The recipe's packed shards; faces are packed into RUN_DIR/shards first (finished shards are kept)."""
    if config.data.shards is not None:
        return Path(os.path.abspath(config.data.shards))
    assert config.data.faces is not None, "the recipe's own check asks for shards or faces"
    return pack_faces(config.data.faces, run_dir / "shards")


def pack_faces(faces: FacesConfig, out: Path, *, start: int = 0) -> Path:
    """Pack a recipe's faces, from number `start` on; shards that are there already are kept. Returns the absolute path."""
    from data_shards.faces import FacesSource

    source = FacesSource(style=faces.style, count=faces.count, seed=faces.seed, start=start, allow_attribution=faces.allow_attribution)
    pack_source(source, out, size=faces.size, seed=faces.seed, workers=os.cpu_count() or 1, samples_per_shard=1000)
    return Path(os.path.abspath(out))


def _show(config: RunConfig, run_dir: Path, ranks: int) -> int:
    """What a run would do, without doing it."""
    sys.stdout.write(f"# would run on {ranks} local ranks in {run_dir}\n{dump_yaml(config)}")
    return 0
