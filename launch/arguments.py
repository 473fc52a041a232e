"""What commands share: their arguments, how these are checked, and how a command ends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from trainer.exit_codes import BAD_INPUT as WORKER_BAD_INPUT

BAD_INPUT = 2

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name (halfstep recipes).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Changes to the recipe, such as train.steps=200; cluster.KEY=VALUE for the cluster."),
]
Cluster = Annotated[str, typer.Option(metavar="C", help="A cluster file, or a shipped one's name.")]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run lives. Default: runs/<recipe name>.")]
Ranks = Annotated[int | None, typer.Option(min=1, metavar="N", help="Run on N local ranks. Default: the cluster file's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print every file and command, start nothing.")]
Follow = Annotated[
    bool, typer.Option("--follow", help="Of a queued run: show its log and end with its exit code. Ctrl-C leaves it running.")
]
Here = Annotated[bool, typer.Option("--here", help="Inside a Slurm allocation (sbatch, salloc): run on its nodes at once.")]
AllowFresh = Annotated[
    bool,
    typer.Option("--allow-fresh", help="Start over where a run's checkpoints are all damaged or gone; without it that is an error."),
]
Deterministic = Annotated[
    bool, typer.Option("--deterministic", help="Only kernels that give the same bits every time: engine.deterministic=true.")
]
Sweep = Annotated[
    list[str] | None,
    typer.Option(metavar="KEY=V1,V2,...", help="A run for each value, below the run's folder; given twice, for each combination."),
]
Source = Annotated[
    Path,
    typer.Argument(metavar="SOURCE", help="A run's directory, a chain's, an export, a pipeline's folder, or the Hub id of a pixel model."),
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's or a chain's directory.")]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Of pixel models ddim or ancestral; of Stable Diffusion ddim, ddpm, dpm++, euler, euler-ancestral, heun, pndm or unipc. "
        "Default: the model's own.",
    ),
]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", metavar="TEXT", help="What to draw; again for each further prompt.")]


def end(code: int) -> NoReturn:
    """End the command with a worker's exit code; bad input is 2 at the command line."""
    raise typer.Exit(BAD_INPUT if code == WORKER_BAD_INPUT else code)


def existing(directory: Path) -> Path:
    """The directory itself. Raises: ValueError if it is not there."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}; give one that halfstep wrote")
    return directory


def existing_source(source: Path) -> Path:
    """The directory itself, or a Hub id. Raises: ValueError if it is neither."""
    from launch.models import is_hub_id

    return source if is_hub_id(str(source)) else existing(source)


def evaluation_file(source: Path) -> Path:
    """Where what is measured of a run or a chain goes, and a report looks for it. Raises: ValueError for what others have written."""
    if (source / "recipe.yaml").exists() and not (source / "model_index.json").exists():
        return source / "evaluation.json"
    raise ValueError(f"{source}: is no run's and no chain's directory, so nothing is written there; give --out FILE.json")


def existing_file(file: Path) -> Path:
    """The file itself. Raises: ValueError if it is not there."""
    if not file.is_file():
        raise ValueError(f"{file}: {'not a file' if file.exists() else 'no such file'}; give the file itself")
    return file


def step_counts(text: str | None, option: str = "--steps") -> Sequence[int] | None:
    """The numbers of `32,16,8`; option: whose they are. Raises: ValueError for another text."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        what = "step counts" if option == "--steps" else "numbers"
        raise ValueError(f"{option} {text}: wanted {what} with commas between them, such as {option} 32,16,8")
    return [int(part) for part in parts]
