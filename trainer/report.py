"""`halfstep report`: gather what directories hold, draw what is missing, write one self-contained page and the picture beside it."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from data_shards import ranks
from data_shards.files import read_json_object, replace_file
from data_shards.index import ShardIndex
from trainer.chain import read_chain
from trainer.config import (
    AutoencodingConfig,
    DenoisingConfig,
    LatentDenoisingConfig,
    ProgressiveDistillationConfig,
    RunConfig,
    TinyUNetConfig,
    pixel_objective,
)
from trainer.config_io import load_recipe
from trainer.evaluation import read_rows
from trainer.export_folder import is_export
from trainer.model_card import find_index
from trainer.options import Options, optional_text
from trainer.pictures import PictureRow, has_model, load_models, overview_picture, picture_row
from trainer.report_page import Stage, Subject, page
from trainer.report_tables import steps_text
from trainer.sample import png
from trainer.source import is_latent, load_source

logger = logging.getLogger(__name__)

_PROGRESS_PICTURES = 6
_PROGRESS_PIXELS = 300


def report_job(path: Path, options: Options) -> int:
    """Write the page about `path`, or about all of `dirs`; a chain's grid also as grid.png beside the page.

    options: dirs (list; default: PATH alone), out (default: PATH/report.html). Pictures that are not there yet are drawn by
    all ranks: a teacher's 1000-step row takes 1,000 network calls. Returns the exit code.
    Raises: ValueError if a directory is neither a run, a chain nor an export. Collective."""
    directories = _directories(path, options)
    out = Path(optional_text(options, "out") or path / "report.html")
    for directory in directories:
        if not any((directory / name).exists() for name in ("chain.json", "recipe.yaml")):
            raise ValueError(f"{directory}: neither a RUN_DIR, a chain's directory nor an export; give one that halfstep wrote")
    pictures = [draw_pictures(directory) for directory in directories]
    if ranks.is_rank_0():
        names = _names(directories)
        subjects = [gather(each, name=name, pictures=drawn) for each, name, drawn in zip(directories, names, pictures, strict=True)]
        out.parent.mkdir(parents=True, exist_ok=True)
        first_grid = next((drawn for drawn in pictures if drawn), None)
        if first_grid:
            replace_file(out.with_name("grid.png"), png(overview_picture(first_grid)))
        replace_file(out, page(subjects))
        logger.info("%s: %s", out, ", ".join(names))
    ranks.barrier()
    return 0


def draw_pictures(directory: Path) -> tuple[PictureRow, ...]:
    """A chain's same-noise pictures: at each count that a model was made for, the student and the teacher. Collective."""
    if not (directory / "chain.json").exists() or not has_model(read_chain(directory)[0].run_dir):
        return ()
    models = load_models(directory)
    return tuple(picture_row(entry, directory) for entry in models.entries(models.step_counts()))


def gather(directory: Path, *, name: str, pictures: tuple[PictureRow, ...] = ()) -> Subject:
    """All that the page shows of one directory."""
    runs = _runs(directory)
    recipe = directory / "recipe.yaml"
    return Subject(
        name=name,
        kind=_kind(directory, runs),
        facts=_facts(directory),
        stages=tuple(read_stage(run_dir, title=title) for title, run_dir in runs if (run_dir / "recipe.yaml").exists()),
        pictures=pictures,
        rows=read_rows(directory / "evaluation.json"),
        progress=_progress(runs[0][1]),
        recipe=recipe.read_text(encoding="utf-8") if recipe.exists() else "",
        credits=_credits(directory),
    )


def read_stage(run_dir: Path, *, title: str) -> Stage:
    """A run's metrics; a last line that is only half written does not count."""
    columns: dict[str, list[float]] = {key: [] for key in ("step", "loss", "images_per_second", "step_seconds", "data_wait_seconds")}
    metrics = run_dir / "metrics.jsonl"
    for line in metrics.read_bytes().splitlines(keepends=True) if metrics.exists() else ():
        if not line.endswith(b"\n"):
            break
        entry = json.loads(line)
        for key, values in columns.items():
            values.append(float(entry[key]))
    return Stage(
        name=run_dir.name,
        title=title,
        updates=load_recipe(run_dir / "recipe.yaml", ()).train.steps,
        steps=tuple(int(step) for step in columns["step"]),
        losses=tuple(columns["loss"]),
        images_per_second=tuple(columns["images_per_second"]),
        step_seconds=tuple(columns["step_seconds"]),
        data_wait_seconds=tuple(columns["data_wait_seconds"]),
    )


def _directories(path: Path, options: Options) -> list[Path]:
    value = options.get("dirs") or [str(path)]
    assert isinstance(value, list) and all(isinstance(each, str) for each in value), f"option dirs is {value!r}, wanted a list of paths"
    return list(dict.fromkeys(Path(each) for each in value))


def _names(directories: Sequence[Path]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    resolved = [directory.resolve() for directory in directories]
    for length in range(1, max(len(path.parts) for path in resolved) + 1):
        names = ["/".join(path.parts[-length:]) for path in resolved]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in resolved]


def _runs(directory: Path) -> list[tuple[str, Path]]:
    """Titles and folders of the runs in a directory, the teacher's first; an export has none to speak of but itself."""
    if not (directory / "chain.json").exists():
        return [("Training", directory)]
    first, *others = read_chain(directory)
    return [("Teacher", first.run_dir), *((f"Student of {steps_text(stage.steps)}", stage.run_dir) for stage in others)]


def _kind(directory: Path, runs: Sequence[tuple[str, Path]]) -> str:
    if (directory / "chain.json").exists():
        counts = [stage.steps for stage in read_chain(directory)]
        return f"A teacher of {counts[0]} sampling steps and its students, each made from the one before: {' → '.join(map(str, counts))}."
    if is_export(directory) and is_latent(directory):
        recipe = load_recipe(directory / "recipe.yaml", ())
        whole = (directory / "model_index.json").exists()
        return f"An exported {'pipeline' if whole else 'LoRA'} ({recipe.model.kind.replace('_', ' ')})."
    if (directory / "model_index.json").exists():
        return f"An exported model that samples in {steps_text(load_source(directory).descriptor.step_count)}."
    recipe = load_recipe(runs[0][1] / "recipe.yaml", ())
    match recipe.objective:
        case ProgressiveDistillationConfig() as halving:
            return f"A student of {steps_text(halving.student_steps)}, made from a teacher of {halving.teacher_steps}."
        case DenoisingConfig():
            return f"A diffusion model trained on a noise schedule of {recipe.noise_schedule.steps} levels."
        case LatentDenoisingConfig():
            return f"A latent diffusion model ({recipe.model.kind.replace('_', ' ')}), {recipe.adaptation.kind} training."
        case AutoencodingConfig():
            return "An autoencoder: images to latents and back."


def _network_facts(recipe: RunConfig) -> tuple[tuple[str, str], ...]:
    model, noise = recipe.model, recipe.noise_schedule
    if not isinstance(model, TinyUNetConfig):
        base = getattr(model, "base", getattr(model, "autoencoder", ""))
        return (("Network", f"{model.kind}{f' from {base}' if base else ''}, {recipe.adaptation.kind} training"),)
    widths = ", ".join(map(str, model.channels))
    return (
        ("Network", f"{model.kind}, channels {widths}, self-attention at {sum(model.attention)} of {len(model.channels)} levels"),
        ("Noise", f"{noise.kind}, {noise.steps} levels, {pixel_objective(recipe).prediction}-prediction"),
    )


def _facts(directory: Path) -> tuple[tuple[str, str], ...]:
    """Recipe and surroundings in a few lines; what is not there is left out."""
    facts = [("Directory", str(directory))]
    if (directory / "recipe.yaml").exists():
        recipe = load_recipe(directory / "recipe.yaml", ())
        optim = recipe.optim
        facts += [
            *_network_facts(recipe),
            (
                "Optimizer",
                f"{optim.kind}, learning rate {optim.learning_rate:g}, batch {recipe.data.global_batch_size}, EMA {recipe.ema.decay:g}",
            ),
            ("Precision and seed", f"{recipe.engine.precision}, seed {recipe.seed}"),
        ]
    # a chain's stages share the chain's surroundings
    environments = [place / "environment.json" for place in (directory, directory.parent) if (place / "environment.json").exists()]
    if environments:
        environment = read_json_object(environments[0])
        packages = environment.get("packages")
        versions = ", ".join(f"{name} {number}" for name, number in packages.items()) if isinstance(packages, Mapping) else ""
        facts += [
            ("Code", f"commit {environment.get('git_commit') or 'unknown'}"),
            ("Machine", f"{environment.get('platform')}, {environment.get('processors')} processors, Python {environment.get('python')}"),
            ("Packages", versions),
        ]
    return tuple(facts)


def _credits(directory: Path) -> tuple[tuple[str, str], ...]:
    """Licence and artists of the training data, where the shards still are."""
    chain = (directory / "chain.json").exists()
    run_dir = read_chain(directory)[0].run_dir if chain else directory
    if not (run_dir / "recipe.yaml").exists() or not (is_export(run_dir) or has_model(run_dir)):
        return ()
    data = load_recipe(run_dir / "recipe.yaml", ()).data
    indexes = [find_index(name, run_dir) for name in [source.shards for source in data.mixture] or [data.shards or "shards"]]
    return tuple(line for index in indexes for line in _credits_of(index))


def _credits_of(index: ShardIndex | None) -> tuple[tuple[str, str], ...]:
    if index is None:
        return (("Data", "the shards are no longer where the recipe says"),)
    licence = index.licence
    creators = licence.get("creators")
    by = f" by {', '.join(map(str, creators))}" if isinstance(creators, list) and creators else ""
    style = f" {index.source['style']}" if "style" in index.source else ""
    size = "several sizes" if index.image_size is None else f"{index.image_size} px"
    return (
        ("Data", f"{index.samples:,} images of {size} from {index.source.get('kind')}{style}{by}"),
        ("Licence of the data", " - ".join(str(licence[key]) for key in ("name", "url") if licence.get(key))),
    )


def _progress(run_dir: Path) -> tuple[tuple[str, bytes], ...]:
    """Up to six of the grids drawn during training, the first and the last among them, made small."""
    found = sorted(path for path in (run_dir / "samples").glob("step_*.png") if path.stem.removeprefix("step_").isdigit())
    count = min(len(found), _PROGRESS_PICTURES)
    chosen = [found[round(number * (len(found) - 1) / max(1, count - 1))] for number in range(count)]
    return tuple((f"after {int(path.stem.removeprefix('step_')):,} steps", _small(path)) for path in chosen)


def _small(path: Path) -> bytes:
    with Image.open(path, formats=("PNG",)) as picture:
        small = picture.convert("RGB")
        small.thumbnail((_PROGRESS_PIXELS, _PROGRESS_PIXELS), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
