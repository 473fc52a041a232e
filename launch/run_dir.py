"""RUN_DIR: made and frozen before the first step, compared at every later one."""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from data_shards.files import json_text, read_json_object, replace_file
from launch.cluster import ClusterConfig
from launch.data import data_identity
from trainer.auto_choice import AUTO_FILE
from trainer.config import RunConfig, identity
from trainer.config_io import dump_yaml, load_recipe
from trainer.stop import clear_stop_request

_PACKAGES = ("halfstep", "torch", "diffusers", "transformers", "webdataset", "safetensors", "numpy", "pillow")
_OPTIONAL_PACKAGES = ("xformers", "deepspeed", "ray", "submitit")


def freeze(run_dir: Path, config: RunConfig, *, shards: Path | Sequence[Path], steps_fixed: bool = False) -> None:
    """Write the complete recipe of a run, or check that a run that is there already has the same identity.

    shards: the folders of the indexes, whose hashes are part of the identity. Fields outside the identity may change from
    attempt to attempt; the frozen recipe follows them. steps_fixed: train.steps may not grow, whatever the learning rate.
    Until a checkpoint is committed there is nothing to resume, and the recipe may still change. What the recipe leaves to be
    measured, and this run has measured, stays as it was frozen.
    Raises: ValueError listing each difference if this is another run."""
    record, folders = run_dir / "identity.json", [shards] if isinstance(shards, Path) else shards
    frozen = with_frozen_choice(run_dir, config)
    wanted = _identity(frozen, folders, steps_fixed=steps_fixed)
    run_dir.mkdir(parents=True, exist_ok=True)
    differences = list(_differences(read_json_object(record), wanted)) if record.exists() else []
    if differences and _has_checkpoint(run_dir):
        lines = "\n".join(f"  {line}" for line in differences)
        raise ValueError(
            f"{run_dir} holds a run of another recipe or other data:\n{lines}\nput these back to resume it, or give another --run-dir"
        )
    if differences:  # what was measured was so for another recipe
        (run_dir / AUTO_FILE).unlink(missing_ok=True)
        frozen, wanted = config, _identity(config, folders, steps_fixed=steps_fixed)
    replace_file(record, json_text(wanted))
    replace_file(run_dir / "recipe.yaml", dump_yaml(frozen))


def with_frozen_choice(run_dir: Path, config: RunConfig) -> RunConfig:
    """The recipe with RUN_DIR's frozen values where it says auto, if that run has measured them or has begun."""
    if not config.train.to_measure or not ((run_dir / AUTO_FILE).exists() or _has_checkpoint(run_dir)):
        return config
    train = load_recipe(run_dir / "recipe.yaml").train
    values = {name: getattr(train, name) for name in config.train.to_measure}
    return config.model_copy(update={"train": config.train.model_copy(update=values)})


def _identity(config: RunConfig, shards: Sequence[Path], *, steps_fixed: bool) -> dict[str, object]:
    """What a resume must not change, the data's hashes included."""
    steps = {"train.steps": config.train.steps} if steps_fixed or not config.steps_may_grow else {}
    return {**identity(config), **data_identity(config.data, shards), **steps}


def _has_checkpoint(run_dir: Path) -> bool:
    """Whether there is anything to lose, in the run or in a stage of the chain: before that a recipe may be mended."""
    return any(path for pattern in ("checkpoints", "*/checkpoints") for path in run_dir.glob(f"{pattern}/step_*/manifest.json"))


def write_surroundings(run_dir: Path, cluster: ClusterConfig) -> None:
    """Write cluster.yaml and environment.json: where this attempt runs and with what."""
    replace_file(run_dir / "cluster.yaml", dump_yaml(cluster))
    clear_stop_request(run_dir)
    environment = {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "git_commit": _git_commit(),
        "packages": {name: found for name in (*_PACKAGES, *_OPTIONAL_PACKAGES) if (found := _version(name))},
    }
    replace_file(run_dir / "environment.json", json_text(environment))


def _differences(was: Mapping[str, object], now: Mapping[str, object]) -> Iterator[str]:
    """Lines `key: was X, now Y` for what two identities do not share."""
    for key in sorted(was.keys() | now.keys()):
        if was.get(key) != now.get(key):
            yield f"{key}: was {json.dumps(was.get(key))}, now {json.dumps(now.get(key))}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the checkout that this code runs from; None for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    found = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or None
