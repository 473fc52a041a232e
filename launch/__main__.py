"""The command line. Each command imports what it needs when it runs, so that `halfstep --help` is instant."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, NoReturn

import typer

app = typer.Typer(
    name="halfstep",
    help="Train image diffusion models, then halve their sampling steps: 1000, 500, 250, ... 1.\n\n"
    "Start with:  halfstep demo\n\nEvery command that was stopped goes on where it was when you give it again.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
shards = typer.Typer(name="shards", help="Make, check and describe shards: plain WebDataset tars with an index.", no_args_is_help=True)
app.add_typer(shards)

BAD_INPUT = 2
_WORKER_BAD_INPUT = 64
# What a failing disk or network file system reports, and a full one: worth another try without a change of input.
_IO_ERROR = 74

Recipe = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a shipped recipe's name (halfstep recipes).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE ...]", help="Changes to the recipe, such as train.steps=200; cluster.KEY=VALUE for the cluster."),
]
Cluster = Annotated[str, typer.Option(metavar="C", help="A cluster file, or a shipped one's name.")]
RunDirOption = Annotated[Path | None, typer.Option("--run-dir", metavar="DIR", help="Where the run lives. Default: runs/<recipe name>.")]
Ranks = Annotated[int | None, typer.Option(min=1, metavar="N", help="Run on N local ranks. Default: the cluster file's.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything, print the complete recipe, start nothing.")]
Source = Annotated[Path, typer.Argument(metavar="SOURCE", help="A run's directory, a chain's directory or an export.")]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A run's or a chain's directory.")]
SamplerOption = Annotated[
    Literal["ddim", "ancestral"] | None, typer.Option(help="ddim or ancestral. Default: the one that the model was made for.")
]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where everything goes.")] = Path("runs/demo"),
    ranks: Annotated[int, typer.Option(min=1, metavar="N", help="Local ranks.")] = 2,
) -> None:
    """The whole way on embedded data: faces, shards, teacher, halvings, samples, report.

    Example:  halfstep demo --ranks 2"""
    from launch.demo import run_demo

    _end(run_demo(out, ranks=ranks))


@app.command()
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Cluster = "local",
    run_dir: RunDirOption = None,
    ranks: Ranks = None,
    dry_run: DryRun = False,
) -> None:
    """Train a recipe. The same command again resumes the run exactly.

    Example:  halfstep train smoke --ranks 2 train.steps=100 optim.learning_rate=3e-4"""
    from launch.start import start_train

    _end(start_train(recipe, overrides or [], run_dir=run_dir, cluster=cluster, ranks=ranks, dry_run=dry_run))


@app.command()
def distill(
    recipe: Recipe,
    overrides: Overrides = None,
    cluster: Cluster = "local",
    run_dir: RunDirOption = None,
    ranks: Ranks = None,
    dry_run: DryRun = False,
) -> None:
    """Halve a teacher's steps again and again: a chain of runs. The same command again continues it.

    Example:  halfstep distill smoke --ranks 2 distill.end_steps=1"""
    from launch.start import start_distill

    _end(start_distill(recipe, overrides or [], run_dir=run_dir, cluster=cluster, ranks=ranks, dry_run=dry_run))


@app.command()
def sample(
    source: Source,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Sampling steps. Default: the model's own.")] = None,
    images: Annotated[int, typer.Option(min=1, metavar="K", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Image i starts from noise of seed S + i.")] = 0,
    out: Annotated[Path, typer.Option(metavar="FILE.png|DIR", help="A grid as .png, or a directory for single images too.")] = Path(
        "samples.png"
    ),
    sampler: SamplerOption = None,
    ranks: Ranks = None,
) -> None:
    """Draw images from a run, a chain or an export.

    Example:  halfstep sample runs/demo --steps 4 --images 16 --seed 7 --out grid.png"""
    options = {"steps": steps, "images": images, "seed": seed, "out": str(out), "sampler": sampler}
    _end(_run("sample", _existing(source), options, ranks=ranks))


@app.command()
def evaluate(
    source: Source,
    reference: Annotated[Path, typer.Option(metavar="SHARDS", help="Shards of images that the model was not trained on.")],
    out: Annotated[Path, typer.Option(metavar="FILE.json", help="Where the table goes: a list of objects.")],
    steps: Annotated[str | None, typer.Option(metavar="N,N,...", help="Step counts, such as 32,16,8. Default: the model's own.")] = None,
    images: Annotated[int, typer.Option(min=2, metavar="K", help="Images per step count.")] = 512,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Seed of the images.")] = 0,
    ranks: Ranks = None,
) -> None:
    """Quality and seconds an image per step count, against held-out images.

    Example:  halfstep evaluate runs/demo --reference runs/demo/reference --steps 8,4,2,1 --out quality.json"""
    options = {
        "reference": str(_existing(reference)),
        "steps": _step_counts(steps),
        "images": images,
        "seed": seed,
        "out": str(out),
    }
    _end(_run("evaluate", _existing(source), options, ranks=ranks))


@app.command()
def report(
    directories: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Directories of runs or chains.")],
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="Where the page goes.")] = Path("report.html"),
) -> None:
    """One self-contained page: curves, sample grids, tables.

    Example:  halfstep report runs/demo --out report.html"""
    found = [_existing(directory) for directory in directories]
    _end(_run("report", found[0], {"dirs": [str(directory) for directory in found], "out": str(out)}, ranks=1))


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new folder. Default: RUN_DIR/export.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Of a chain: the stage whose model samples in N steps.")] = None,
    push: Annotated[str | None, typer.Option(metavar="REPO", help="Upload to this Hugging Face repository, owner/name, too.")] = None,
) -> None:
    """Write a folder that stock diffusers loads, with EMA weights and a model card.

    Example:  halfstep export runs/demo --steps 4 --out faces-4-steps"""
    options = {"out": None if out is None else str(out), "steps": steps, "push": push}
    _end(_run("export", _existing(run_dir), options, ranks=1))


@app.command()
def status(
    run_dir: RunDir,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """Where a run or a chain stands, and why it last ended.

    Example:  halfstep status runs/demo"""
    from launch.status import print_status

    _end(print_status(_existing(run_dir), as_json=as_json))


@app.command("hash")
def hash_(run_dir: RunDir) -> None:
    """Three hashes that two equal runs share: weights, EMA weights, samples delivered.

    Example:  halfstep hash runs/smoke"""
    _end(_run("hash", _existing(run_dir), {}, ranks=1))


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this recipe.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of recipes, for editors.")] = False,
) -> None:
    """List the shipped recipes, print one, or print their schema.

    Example:  halfstep recipes demo > my-recipe.yaml"""
    import json

    from trainer.config_io import json_schema, recipe_path, shipped

    if schema:
        sys.stdout.write(json.dumps(json_schema(), indent=2) + "\n")
    elif name:
        sys.stdout.write(recipe_path(name).read_text(encoding="utf-8"))
    else:
        for file in shipped("recipes"):
            comments = [line[2:] for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("# ")]
            about = next(line for line in comments if not line.startswith("yaml-language-server"))
            sys.stdout.write(f"{file.stem:12} {about}\n")


@shards.command("pack")
def shards_pack(
    source: Annotated[Literal["faces", "folder"], typer.Option(help="faces: drawn here; folder: your own images.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The new directory of shards.")],
    directory: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="With --source folder: the images, captions as .txt.")] = None,
    style: Annotated[str, typer.Option(metavar="NAME", help="Style of the faces.")] = "open-peeps",
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Number of faces.")] = 6000,
    start: Annotated[int, typer.Option(min=0, metavar="I", help="First face; another start gives other faces, held out of these.")] = 0,
    size: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Width and height; images are cropped to a square.")] = 32,
    seed: Annotated[int, typer.Option(min=0, metavar="S", help="Seed of the faces and of their order.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, metavar="N", help="Processes. Default: one per core.")] = None,
    samples_per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Images per tar.")] = 1000,
    licence: Annotated[str, typer.Option(metavar="TEXT", help="With --source folder: the licence of your images.")] = "not stated",
    allow_attribution: Annotated[
        bool, typer.Option("--allow-attribution", help="Permit styles whose artist must be named (CC BY 4.0).")
    ] = False,
) -> None:
    """Pack images into shuffled tars with an index; the same input and seed give the same bytes.

    Example:  halfstep shards pack --source faces --style open-peeps --count 6000 --size 32 --out shards/faces

    Example:  halfstep shards pack --source folder my-images --size 64 --out shards/mine"""
    from launch.shards import pack_source

    if source == "folder":
        if directory is None:
            raise ValueError("--source folder wants the folder of images: halfstep shards pack --source folder DIR --out OUT")
        from data_shards.folder import FolderSource

        images = FolderSource.scan(directory, licence=licence)
    else:
        if directory is not None:
            raise ValueError(f"--source faces draws its images and reads no folder, got {directory}; did you mean --source folder?")
        from data_shards.faces import FacesSource

        images = FacesSource(style=style, count=count, seed=seed, start=start, allow_attribution=allow_attribution)
    line = pack_source(images, out, size=size, seed=seed, workers=workers or os.cpu_count() or 1, samples_per_shard=samples_per_shard)
    sys.stdout.write(f"{line}\nuse it:  halfstep train RECIPE data.shards={out}\n")


@shards.command("verify")
def shards_verify(directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of shards.")]) -> None:
    """Read every byte of shards and name what is damaged; exit code 2 if anything is.

    Example:  halfstep shards verify shards/faces"""
    from launch.shards import verify_shards

    _end(verify_shards(_existing(directory)))


@shards.command("info")
def shards_info(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of shards.")],
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a contact sheet too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of lines.")] = False,
) -> None:
    """What shards hold: counts, sizes, licence, how they were made.

    Example:  halfstep shards info shards/faces --sheet faces.png"""
    from launch.shards import describe_shards

    describe_shards(_existing(directory), sheet=sheet, as_json=as_json)


def main() -> NoReturn:
    """The console script: input that cannot be used ends in one message and exit code 2."""
    try:
        app()
    except ValueError as error:
        from trainer.config_io import RecipeErrors

        # a recipe's mistakes start with file:line, so that editors and terminals can jump there
        sys.stderr.write(f"{error}\n" if isinstance(error, RecipeErrors) else f"error: {error}\n")
        sys.exit(BAD_INPUT)
    except OSError as error:
        import errno

        sys.stderr.write(f"error: {error}\n")
        sys.exit(_IO_ERROR if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS) else BAD_INPUT)
    except RuntimeError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    sys.exit(0)


def _end(code: int) -> None:
    """Ends the command with a worker's exit code; bad input is 2 at the command line."""
    raise typer.Exit(BAD_INPUT if code == _WORKER_BAD_INPUT else code)


def _run(kind: str, path: Path, options: dict[str, object], *, ranks: int | None) -> int:
    """Runs a job that owns no folder on local ranks."""
    from launch.cluster import load_cluster
    from launch.local import Job, run_job

    cluster = load_cluster("local", [])
    count = ranks or cluster.ranks_per_node
    # Unlike a run's, these ranks own the whole machine for a short time.
    cluster = cluster.model_copy(update={"threads_per_rank": max(1, (os.cpu_count() or 1) // count)})
    return run_job(Job(kind, path, options), cluster, ranks=count)


def _existing(directory: Path) -> Path:
    if not directory.is_dir():
        raise ValueError(f"{directory}: {'not a directory' if directory.exists() else 'no such directory'}; give one that halfstep wrote")
    return directory


def _step_counts(text: str | None) -> Sequence[int] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--steps {text}: wanted step counts with commas between them, such as --steps 32,16,8")
    return [int(part) for part in parts]


if __name__ == "__main__":
    main()
