"""From a recipe to running ranks: shards packed where the recipe asks for it, folders frozen, ranks started."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from data_shards.index import ShardIndex
from launch.chain import freeze_chain, with_teacher
from launch.cluster import ClusterConfig, LocalCluster, RayCluster, SlurmCluster, load_cluster
from launch.data import check_shards, data_folders, seen_from_here, with_data
from launch.dry_run import dry_run_text
from launch.job import Job, train_options
from launch.local import run_until_done
from launch.models import check_models, is_hub_id, teacher_place, with_models
from launch.run_dir import freeze, write_surroundings
from launch.run_lock import locked
from launch.sweep import is_sweep
from trainer.chain import read_chain
from trainer.config import DataConfig, DistillConfig, RunConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.exit_codes import DONE
from trainer.export_folder import with_teacher_path
from trainer.stock import is_stock


@dataclass(frozen=True)
class How:
    """What `halfstep train` and `halfstep distill` are told besides the recipe."""

    run_dir: Path | None = None
    """None takes runs/<recipe name>."""
    cluster: str = "local"
    ranks: int | None = None
    """Of a local run; None takes the cluster file's."""
    dry_run: bool = False
    allow_fresh: bool = False
    """Start over where no checkpoint of the run is left whole."""
    follow: bool = False
    """Of a queued run: show its log and end with its exit code."""
    here: bool = False
    """Inside a Slurm allocation: run on its nodes at once."""
    sweep: Sequence[str] = ()
    """KEY=VALUE,VALUE,... texts: a run for each combination."""
    profile: bool = False
    """Watch some steps of a single run."""


def start_train(recipe: str, overrides: Sequence[str], how: How) -> int:
    """Train a recipe, or resume it where RUN_DIR holds its run; returns the run's exit code, 0 for one that is queued.

    Raises: ValueError for a recipe, cluster, data or folder that cannot be used."""
    config, machines, folder = prepare(recipe, overrides, how)
    options = train_options(allow_fresh=how.allow_fresh, profile=how.profile)
    check_trains(recipe, config)
    if how.dry_run:
        sys.stdout.write(dry_run_text(Job("train", folder, options), config, machines))
        return DONE
    if (folder / "chain.json").exists():
        raise ValueError(f"{folder}: holds a chain of halvings; go on with `halfstep distill`, or give another --run-dir")
    if (folder.parent / "chain.json").exists() and folder.name in (stage.name for stage in read_chain(folder.parent)):
        raise ValueError(f"{folder}: is a stage of a chain; go on with `halfstep distill {folder.parent}/recipe.yaml`")
    if is_sweep(folder):
        raise ValueError(f"{folder}: holds a sweep; go on with the same --sweep, or give another --run-dir")
    if is_queued(folder, machines, how):
        return follow_queued(folder) if how.follow else DONE
    with locked(folder) as lock:
        warn_of_shared_shards(freeze_run(folder, config, machines, shards_in=folder / "shards"), machines)
        code = launch_job(Job("train", folder, options), machines, how, lock)
    if code == DONE and isinstance(machines, LocalCluster):
        export = folder / "export"
        next_step = f"the model is in {export}" if export.exists() else f"halfstep export {folder} makes the model ready to hand on"
        sys.stdout.write(f"{folder}: all {config.train.steps} steps are done; {next_step}\n")
    return code


def freeze_run(folder: Path, config: RunConfig, machines: ClusterConfig, *, shards_in: Path) -> list[Path]:
    """Make a RUN_DIR ready to start: data at hand, recipe and cluster frozen; returns the folders of its indexes.

    shards_in: where faces and remote indexes go, in the run's folder or the one above it. Raises: ValueError if it holds another run."""
    folder.mkdir(parents=True, exist_ok=True)
    config = with_models(config, folder)
    shards = data_folders(config, shards_in)
    config = with_data(config, shards, run_dir=folder, root=shards_in.parent)
    freeze(folder, _with_absolute_teacher(config), shards=shards)
    write_surroundings(folder, machines)
    return shards


def start_distill(recipe: str, overrides: Sequence[str], how: How) -> int:
    """Run a chain of halvings, or go on with it; returns the exit code of the stage that ended it, 0 when all are done or queued.

    Raises: ValueError for a recipe, cluster, teacher, data or folder that cannot be used."""
    config, machines, folder = prepare(recipe, overrides, how)
    options = train_options(allow_fresh=how.allow_fresh)
    config = chain_config(recipe, config, machines)
    if how.dry_run:
        sys.stdout.write(dry_run_text(Job("distill", folder, options), config, machines))
        return DONE
    if is_sweep(folder):
        raise ValueError(f"{folder}: holds a sweep; give another --run-dir")
    if (folder / "metrics.jsonl").exists():
        halve = "give" if config.distill and config.distill.teacher else f"halve it with distill.teacher={folder} and"
        raise ValueError(f"{folder}: holds a single run; {halve} another --run-dir")
    if is_queued(folder, machines, how):
        return follow_queued(folder) if how.follow else DONE
    with locked(folder) as lock:
        warn_of_shared_shards(freeze_chain_run(folder, config, machines, shards_in=folder / "shards"), machines)
        return launch_job(Job("distill", folder, options), machines, how, lock)


def chain_config(recipe: str, config: RunConfig, machines: ClusterConfig) -> RunConfig:
    """The recipe of a chain with what its teacher decides. Raises: ValueError without a distill section, or where the ranks do not fit."""
    distill = config.distill
    if distill is None:
        raise ValueError(f"{recipe_path(recipe)}: has no distill section; add one (halfstep recipes demo shows it) or use `halfstep train`")
    if distill.teacher is not None:
        config = with_teacher(config, distill.teacher)
    if _is_made_of_its_base(distill):
        check_models(config)
    check_ranks(config.stage_data, machines.ranks, section="distill")
    return config


def freeze_chain_run(folder: Path, config: RunConfig, machines: ClusterConfig, *, shards_in: Path) -> list[Path]:
    """Make a chain's directory ready to start, as freeze_run a run's; returns the folders of its indexes."""
    folder.mkdir(parents=True, exist_ok=True)
    distill = config.distill
    assert distill is not None, "a chain's recipe"
    if _is_made_of_its_base(distill):
        config = with_models(config, folder)
    shards = data_folders(config, shards_in)
    freeze_chain(folder, config, distill, shards=shards)
    write_surroundings(folder, machines)
    return shards


def _is_made_of_its_base(distill: DistillConfig) -> bool:
    """Whether a chain begins with the models that its recipe names. Those of a run or an export were found when it was
    trained, and no student needs the base itself."""
    return distill.teacher is None or is_stock(Path(distill.teacher)) or is_hub_id(distill.teacher)


def check_trains(recipe: str, config: RunConfig) -> None:
    """Raises: ValueError for a recipe that only halves, or models that it names and that are not there."""
    if config.distill is not None and config.distill.teacher is not None:
        raise ValueError(
            f"{recipe}: halves a teacher that there is already (distill.teacher={config.distill.teacher}); "
            f"use `halfstep distill {recipe}`, or set distill=null to train its model section"
        )
    check_models(config)


def prepare(recipe: str, overrides: Sequence[str], how: How) -> tuple[RunConfig, ClusterConfig, Path]:
    """Recipe, cluster and RUN_DIR, checked against each other."""
    own = [text for text in overrides if not text.startswith("cluster.")]
    path = recipe_path(recipe)
    config, home = load_recipe(path, own), _run_dir_of(path)
    if home is not None and not any(text.startswith(("data.shards", "data.mixture")) for text in own):
        config = seen_from_here(config, home)
    about_cluster = [text.removeprefix("cluster.") for text in overrides if text.startswith("cluster.")]
    machines = load_cluster(how.cluster, about_cluster)
    if how.here:
        if not isinstance(machines, SlurmCluster):
            raise ValueError(
                f"--here runs on the nodes of a Slurm job, and --cluster {how.cluster} is of kind {machines.kind}; give slurm's"
            )
        machines = load_cluster(how.cluster, [*about_cluster, *_allocated()])
    if how.ranks is not None:
        if not isinstance(machines, LocalCluster):
            text = "is for runs on this machine; set cluster.nodes and cluster.ranks_per_node"
            raise ValueError(f"--ranks {how.ranks}: {text}, or leave --cluster {how.cluster} out")
        machines = machines.model_copy(update={"ranks_per_node": how.ranks})
    check_ranks(config.data, machines.ranks)
    check_engine(config, machines.ranks)
    check_shards(config.data)
    return config, machines, how.run_dir or home or Path("runs") / path.stem


def _run_dir_of(recipe: Path) -> Path | None:
    """The RUN_DIR that a recipe was frozen in, with which it goes on; None for a recipe that people have written."""
    return recipe.parent if recipe.name == "recipe.yaml" and (recipe.parent / "identity.json").exists() else None


def _allocated() -> list[str]:
    from launch.slurm_job import allocated

    return allocated()


def is_queued(folder: Path, machines: ClusterConfig, how: How) -> bool:
    """Whether the run waits or runs as a job already, which is then said; a job that is held is let go on."""
    if isinstance(machines, LocalCluster) or how.here:
        return False
    from launch.queued import let_go_on

    return let_go_on(folder)


def follow_queued(folder: Path) -> int:
    """Show a queued run's log until it ends; returns its exit code."""
    from launch.queued import follow

    return follow(folder)


def launch_job(job: Job, machines: ClusterConfig, how: How, lock: int) -> int:
    """Hand the job over to the launcher of the cluster's kind."""
    match machines:
        case LocalCluster():
            return run_until_done(job, machines, ranks=machines.ranks, run_dir=job.path, lock=lock)
        case SlurmCluster() if how.here:
            from launch.slurm_job import run_here

            return run_here(job, machines)
        case SlurmCluster():
            from launch.slurm import submit

            submit(job, machines)
            return follow_queued(job.path) if how.follow else DONE
        case RayCluster():
            from launch.ray_train import run_on_ray

            return run_on_ray(job, machines, follow=how.follow)


def warn_of_shared_shards(shards: Sequence[Path], machines: ClusterConfig) -> None:
    """Say so where ranks of several machines must read the same shard; on one machine that costs nothing."""
    count, ranks = sum(len(ShardIndex.load(folder).shards) for folder in shards), machines.ranks
    if count < ranks and not isinstance(machines, LocalCluster):
        sys.stderr.write(
            f"warning: {ranks} ranks share {count} shard{'' if count == 1 else 's'} of {', '.join(map(str, shards))}: each is read by "
            f"several ranks; for speed pack into at least {ranks} shards (halfstep shards pack --samples-per-shard N)\n"
        )


def check_ranks(data: DataConfig, ranks: int, *, section: Literal["data", "distill"] = "data") -> None:
    """Raises: ValueError if so many ranks cannot divide the micro-batches of a global batch. section: of the recipe, where mended."""
    count = data.global_batch_size // data.micro_batch_size
    if count % ranks:
        raise ValueError(
            f"{ranks} ranks cannot divide {count} micro-batches (global batch {data.global_batch_size} / micro-batch "
            f"{data.micro_batch_size}); give --ranks (or cluster.nodes x cluster.ranks_per_node) a divisor of {count}, "
            f"or change {section}.micro_batch_size"
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
    return with_teacher_path(config, lambda teacher: teacher_place(teacher, getattr(config.model, "revision", None)))
