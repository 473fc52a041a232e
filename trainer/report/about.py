"""What a directory is, in words: kind, recipe and surroundings in a few lines, the data's licence, settings to compare."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.files import read_json_object
from data_shards.index import ShardIndex
from trainer.chain import read_chain
from trainer.config import (
    AutoencodingConfig,
    DenoisingConfig,
    LatentDenoisingConfig,
    ProgressiveDistillationConfig,
    RunConfig,
    TinyUNetConfig,
    identity,
    pixel_objective,
)
from trainer.config_data import DATA_SHA256
from trainer.config_io import load_recipe
from trainer.export_folder import is_export
from trainer.model_card import find_index
from trainer.pictures import has_model
from trainer.report.html import steps_text
from trainer.source import is_latent, load_source

_LONGEST = 40


def kind_of(directory: Path) -> str:
    """What a directory is, in a sentence's words."""
    if (directory / "chain.json").exists():
        counts = [stage.steps for stage in read_chain(directory)]
        return f"A teacher of {counts[0]} sampling steps and its students, each made from the one before: {' → '.join(map(str, counts))}."
    if is_export(directory) and is_latent(directory):
        recipe = load_recipe(directory / "recipe.yaml", ())
        whole = (directory / "model_index.json").exists()
        return f"An exported {'pipeline' if whole else 'LoRA'} ({recipe.model.kind.replace('_', ' ')})."
    if (directory / "model_index.json").exists():
        return f"An exported model that samples in {steps_text(load_source(directory).descriptor.step_count)}."
    recipe = load_recipe(directory / "recipe.yaml", ())
    match recipe.objective:
        case ProgressiveDistillationConfig() as halving:
            return f"A student of {steps_text(halving.student_steps)}, made from a teacher of {halving.teacher_steps}."
        case DenoisingConfig():
            return f"A diffusion model trained on a noise schedule of {recipe.noise_schedule.steps} levels."
        case LatentDenoisingConfig():
            return f"A latent diffusion model ({recipe.model.kind.replace('_', ' ')}), {recipe.adaptation.kind} training."
        case AutoencodingConfig():
            return "An autoencoder: images to latents and back."


def stage_title(recipe: RunConfig) -> str:
    """What a run trains: curves of one title share a plot."""
    match recipe.objective:
        case ProgressiveDistillationConfig() as halving:
            return f"Student of {steps_text(halving.student_steps)}"
        case AutoencodingConfig():
            return "Autoencoder"
        case DenoisingConfig() | LatentDenoisingConfig():
            return "Fine-tuning" if base_of(recipe) else "Training"


def base_of(recipe: RunConfig) -> str:
    """The model that a recipe fine-tunes; empty for one that starts from random weights."""
    model = recipe.model.model_dump()
    found = (model.get(key) for key in ("base", "start"))
    return next((value for value in found if isinstance(value, str) and value), "")


def settings_of(directory: Path) -> dict[str, str]:
    """The recipe as dotted keys and short texts: its identity and, by their last two folders, its data, base and length."""
    recipe = load_recipe(directory / "recipe.yaml", ())
    named = {
        "train.steps": recipe.train.steps,
        "data.shards": _place(recipe.data.shards),
        "data.role": recipe.data.role,
        "data.mixture": [_place(source.shards) for source in recipe.data.mixture],
        "model.base": _place(base_of(recipe)),
    }
    # where a teacher lies, and the seeds that a chain gives its stages, say nothing by themselves
    silent = ("objective.teacher", "distill.teacher")
    halves = (directory / "chain.json").exists()  # a run's recipe may have the section, too
    values = {key: value for key, value in identity(recipe).items() if key not in silent and (halves or not key.startswith("distill."))}
    record = directory / "identity.json"
    if record.exists() and isinstance(sha256 := read_json_object(record).get(DATA_SHA256), str):
        values[DATA_SHA256] = sha256
    return {key: _text(value) for key, value in {**values, **named}.items()}


def facts_of(directory: Path) -> tuple[tuple[str, str], ...]:
    """Recipe and surroundings in a few lines; what is not there is left out."""
    facts = [("Directory", str(directory))]
    if (directory / "recipe.yaml").exists():
        recipe = load_recipe(directory / "recipe.yaml", ())
        optim, ema = recipe.optim, f"EMA {recipe.ema.decay:g}"
        learning = f"{optim.kind}, learning rate {optim.learning_rate:g}, batch {recipe.data.global_batch_size}, {ema}"
        facts += [
            *_network_facts(recipe),
            ("Optimizer", learning),
            ("Precision and seed", f"{recipe.engine.precision}, seed {recipe.seed}"),
            *([("Role of the data", recipe.data.role.replace("_", " "))] if recipe.data.role else []),
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


def credits_of(directory: Path) -> tuple[tuple[str, str], ...]:
    """Licence and artists of the training data, where the shards still are."""
    chain = (directory / "chain.json").exists()
    run_dir = read_chain(directory)[0].run_dir if chain else directory
    if not (run_dir / "recipe.yaml").exists() or not (is_export(run_dir) or has_model(run_dir)):
        return ()
    data = load_recipe(run_dir / "recipe.yaml", ()).data
    indexes = [find_index(name, run_dir) for name in data.places or ("shards",)]
    return tuple(line for index in indexes for line in _credits_of(index))


def _network_facts(recipe: RunConfig) -> tuple[tuple[str, str], ...]:
    model, noise = recipe.model, recipe.noise_schedule
    if not isinstance(model, TinyUNetConfig):
        base = base_of(recipe) or getattr(model, "autoencoder", "")
        return (("Network", f"{model.kind}{f' from {base}' if base else ''}, {recipe.adaptation.kind} training"),)
    widths = ", ".join(map(str, model.channels))
    return (
        ("Network", f"{model.kind}, channels {widths}, self-attention at {sum(model.attention)} of {len(model.channels)} levels"),
        ("Noise", f"{noise.kind}, {noise.steps} levels, {pixel_objective(recipe).prediction}-prediction"),
    )


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


def _place(path: str | None) -> str:
    return "/".join(Path(path).parts[-2:]) if path else ""


def _text(value: object) -> str:
    """A recipe's value in few letters."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:g}"
        case list() | tuple():
            text = ", ".join(map(_text, _grouped(value)))
        case None | "":
            return "–"
        case _:
            text = str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _grouped(values: Sequence[object]) -> Sequence[object]:
    return [values[0], f"… ({len(values)})"] if len(values) > 12 else values
