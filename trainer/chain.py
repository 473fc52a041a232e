"""chain.json: the stages of a chain of halvings, as `halfstep distill` lists them."""

from dataclasses import dataclass
from pathlib import Path
from typing import final

from data_shards.files import read_json_object

SCHEMA_VERSION = 1


@final
@dataclass(frozen=True)
class ChainStage:
    """One model of a chain: a full run of its own, which samples in `steps` steps."""

    name: str
    steps: int
    run_dir: Path
    trained_here: bool
    """Whether the chain trains it; a teacher from elsewhere is only read."""


def read_chain(path: Path) -> tuple[ChainStage, ...]:
    """The stages that a chain's directory lists, teacher first; a stage's RUN_DIR may not have been started yet.

    Raises: ValueError naming the file if chain.json is not of this schema."""
    file = path / "chain.json"
    fields = read_json_object(file)
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{file}: schema_version is {fields.get('schema_version')}, this halfstep reads {SCHEMA_VERSION}")
    stages = fields.get("stages")
    if not isinstance(stages, list) or not stages:
        raise ValueError(f"{file}: wanted a list of stages; run `halfstep distill` again with --run-dir {path} to rewrite it")
    return tuple(_stage(file, number, entry) for number, entry in enumerate(stages))


def _stage(file: Path, number: int, entry: object) -> ChainStage:
    match entry:
        case {"name": str(name), "steps": int(steps), "run_dir": str(run_dir)}:
            # The chain's own stages lie in its folder; with a slash it is an absolute path or a Hub id.
            here = "/" not in run_dir
            return ChainStage(name=name, steps=steps, run_dir=file.parent / run_dir if here else Path(run_dir), trained_here=here)
    raise ValueError(f"{file}: stage {number} is {entry!r}, wanted an object with name, steps (an integer) and run_dir")
