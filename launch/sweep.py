"""Sweeps: one recipe, each combination of some values, a RUN_DIR for each; sweep.json lists them."""

import itertools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_shards.files import json_text, read_json_object, replace_file

_FILE = "sweep.json"


def combinations(sweeps: Sequence[str]) -> list[tuple[str, ...]]:
    """The overrides of each run of a sweep: every combination of the values of KEY=VALUE,VALUE,... texts, the last one fastest.

    Raises: ValueError for a text of another shape."""
    keys = [text.partition("=")[0] for text in sweeps]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"--sweep {key}=...: given twice; put all values into one")
    return list(itertools.product(*map(_choices, sweeps)))


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The KEY=VALUE words of a command line: those that hold for every run, and those with several values between commas.

    Raises: ValueError if none has several."""
    several = [word for word in words if len(list(_split(word.partition("=")[2]))) > 1]
    if not several:
        raise ValueError("nothing to try: give KEY=V1,V2,... such as optim.learning_rate=1e-5,3e-5, or use `halfstep train`")
    return [word for word in words if word not in several], several


def run_name(number: int, overrides: Sequence[str]) -> str:
    """The folder of a run of a sweep: its number and what is special about it."""
    parts = (override.partition("=") for override in overrides)
    return f"{number:03d}_" + re.sub(r"[^A-Za-z0-9._=-]", "-", "_".join(f"{key.rpartition('.')[2]}={value}" for key, _, value in parts))


def write_sweep(folder: Path, runs: Sequence[Path]) -> None:
    """List the runs of a sweep, or check that the folder holds the same sweep.

    Raises: ValueError if it holds another one."""
    names = [run.name for run in runs]
    if is_sweep(folder):
        before = [run.name for run in sweep_runs(folder)]
        if before != names:
            text = f"holds a sweep of {', '.join(before)}, not of {', '.join(names)}"
            raise ValueError(f"{folder}: {text}; give the same --sweep to go on with it, or another --run-dir")
    replace_file(folder / _FILE, json_text({"schema_version": 1, "runs": names}))


def is_sweep(folder: Path) -> bool:
    """Whether a folder holds the runs of a sweep."""
    return (folder / _FILE).exists()


def sweep_runs(folder: Path) -> list[Path]:
    """The RUN_DIRs of a sweep in their order.

    Raises: ValueError naming the file if it is not a sweep's."""
    runs = read_json_object(folder / _FILE).get("runs")
    if not isinstance(runs, list) or not all(isinstance(name, str) and Path(name).name == name not in ("", "..") for name in runs):
        raise ValueError(f"{folder / _FILE}: wanted a list of folder names under runs")
    return [folder / name for name in runs]


def run_of_element(folder: Path, element: int) -> Path:
    """The RUN_DIR of an element of a job array.

    Raises: ValueError if the sweep has no such run."""
    runs = sweep_runs(folder)
    if not 0 <= element < len(runs):
        raise ValueError(f"{folder}: the sweep has {len(runs)} runs, this job is number {element}")
    return runs[element]


def _choices(text: str) -> list[str]:
    key, equals, values = text.partition("=")
    found = list(_split(values))
    if not equals or not key or len(found) < 2 or not all(value.strip() for value in found):
        raise ValueError(f"--sweep {text}: wanted KEY=VALUE,VALUE,... such as --sweep optim.learning_rate=1e-5,3e-5")
    if key.startswith("cluster."):
        raise ValueError(f"--sweep {text}: a sweep varies the recipe, not the cluster; give {key}=VALUE once")
    return [f"{key}={value.strip()}" for value in found]


def _split(values: str) -> Iterator[str]:
    """Values between commas that are in no brackets."""
    depth, start = 0, 0
    for position, letter in enumerate(values):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            yield values[start:position]
            start = position + 1
    yield values[start:]
