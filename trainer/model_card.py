"""The README.md of an export: what the model is, what it was made from and how it is sampled."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from data_shards.index import ShardIndex
from trainer.config import DdpmConfig, pixel_objective
from trainer.export_folder import is_hub_id, public_name
from trainer.source import Source

TAGS = ("halfstep", "diffusers", "diffusers-training", "unconditional-image-generation")
HUB_LICENCES = {"CC0-1.0": "cc0-1.0", "CC-BY-4.0": "cc-by-4.0"}
"""SPDX names of data licences to the names that a card's header on the Hub may use."""


def model_card(source: Source, *, name: str, pipeline: str, sample_steps: int) -> str:
    """The card's Markdown.

    name: what the example loads, a folder or a Hub repository. pipeline: the stock pipeline's class.
    sample_steps: in how many steps samples.png was drawn."""
    data = find_data(source)
    sections = (
        _header(source, data),
        _summary(source),
        f"![{sample_steps} sampling steps from fixed noise](samples.png)\n\nsamples.png: {sample_steps} sampling steps, seed 0.",
        _usage(source, name=name, pipeline=pipeline),
        _made_from(source),
        data_section(data),
        _metrics_section(source),
    )
    return "\n\n".join(section for section in sections if section) + "\n"


def find_data(source: Source) -> ShardIndex | None:
    """The index of the shards that a run was trained on; None where they are no longer there."""
    return find_index(source.recipe.data.shards or "shards", source.path)


def find_index(shards: str, run_dir: Path) -> ShardIndex | None:
    """The index of a folder of shards that a recipe names, in or beside the run's folder; None where it is no longer there."""
    for place in (run_dir / shards, run_dir.parent / shards, Path(shards)):
        if (place / "index.json").exists():
            return ShardIndex.load(place)
    return None


def _header(source: Source, data: ShardIndex | None) -> str:
    """YAML for the Hub: library, pipeline tag, licence of the data, tags."""
    licence = str(data.licence.get("name")) if data else "unknown"
    lines = ["---", "library_name: diffusers", "pipeline_tag: unconditional-image-generation"]
    if licence in HUB_LICENCES and source.descriptor.base is None:
        lines.append(f"license: {HUB_LICENCES[licence]}")
    if (base := _base(source)) is not None and is_hub_id(base):
        lines.append(f"base_model: {base.partition('@')[0]}")
    tags = (*TAGS, "progressive-distillation") if source.descriptor.teacher_sha256 else TAGS
    return "\n".join((*lines, "tags:", *(f"- {tag}" for tag in tags), "---"))


def _summary(source: Source) -> str:
    descriptor, base = source.descriptor, _base(source)
    if descriptor.teacher_sha256:
        kind = "A student of progressive distillation" + (f" whose first teacher was made from `{base}`" if base else "")
    elif source.stock:
        kind = f"`{base}` as others have trained it"
    else:
        kind = f"`{base}`, fine-tuned" if base else "A diffusion model trained from scratch"
    size = f"{descriptor.image_size} x {descriptor.image_size}"
    plural = "step" if descriptor.step_count == 1 else "steps"
    return f"# {size} images in {descriptor.step_count} {plural}\n\n{kind}, {'exported by' if source.stock else 'made with'} halfstep."


def _base(source: Source) -> str | None:
    """What others know the base by, with its revision if it has one; None for a model from scratch."""
    model = source.recipe.model
    if not isinstance(model, DdpmConfig):
        return None
    return public_name(model.base) + (f"@{model.revision}" if model.revision else "")


def _usage(source: Source, *, name: str, pipeline: str) -> str:
    """Four lines of Python, and why the step count stands there."""
    steps = source.descriptor.step_count
    why = (
        "Always give `num_inference_steps`: the pipeline's own default is another number, and this model has no other noise levels."
        if source.descriptor.teacher_sha256
        else f"Fewer steps work too; {steps} is the grid that it was trained on."
    )
    return "\n".join(
        (
            "## How to sample",
            "",
            "```python",
            f"from diffusers import {pipeline}",
            f'pipeline = {pipeline}.from_pretrained("{name}")',
            f"images = pipeline(batch_size=4, num_inference_steps={steps}).images",
            'images[0].save("sample.png")',
            "```",
            "",
            why,
        )
    )


def _made_from(source: Source) -> str:
    recipe, descriptor, schedule = source.recipe, source.descriptor, source.recipe.noise_schedule.kind
    schedule = "the base's" if schedule == "base" else schedule
    parameters = sum(parameter.numel() for parameter in source.model.parameters())
    rows = {
        **({} if source.stock else {"Objective": recipe.objective.kind.replace("_", " "), "Loss": pixel_objective(recipe).loss}),
        "Prediction": descriptor.prediction_type,
        "Noise schedule": f"{schedule}, {len(source.alpha_bar)} levels",
        "Sampler": descriptor.sampler,
        "Parameters": f"{parameters:,}",
        **({} if descriptor.base is None else {"Base (sha256)": f"`{descriptor.base.sha256}`"}),
        **_training_rows(source),
        "Weights (sha256)": f"`{source.weights_sha256}`",
        "Teacher (sha256)": f"`{descriptor.teacher_sha256}`" if descriptor.teacher_sha256 else "none",
    }
    recipe_table = table(("", ""), tuple(rows.items()))
    return f"## Recipe\n\n{recipe_table}\n\nThe whole of it is in `recipe.yaml`; `descriptor.json` says what the weights mean."


def _training_rows(source: Source) -> dict[str, str]:
    """How the weights were trained; nothing where others have done it."""
    recipe = source.recipe
    if source.stock:
        return {}
    return {
        "Optimizer steps": f"{source.trained_steps:,}" if source.trained_steps is not None else "not known",
        "Images a step": str(recipe.data.global_batch_size),
        "Optimizer": f"{recipe.optim.kind}, learning rate {recipe.optim.learning_rate:g} ({recipe.lr_schedule.kind})",
        "EMA decay": f"{recipe.ema.decay:g} (these are the averaged weights)",
        "Precision": recipe.engine.precision,
        "Seed": str(recipe.seed),
    }


def data_section(data: ShardIndex | None) -> str:
    """What is known of the training images, and who has to be named."""
    if data is None:
        return "## Data\n\nThe shards were not at hand when this card was written; see `recipe.yaml`."
    licence = data.licence
    rows = [("Images", f"{data.samples:,} of {data.image_size} x {data.image_size} pixels"), ("Licence", _licence(licence))]
    creators = licence.get("creators")
    if isinstance(creators, list) and creators:
        rows.append(("By", ", ".join(map(_plain, creators)) + (" (name them)" if licence.get("attribution_required") else "")))
    rows += [(key.replace("_", " ").capitalize(), _plain(value)) for key, value in data.source.items() if isinstance(value, str | int)]
    rows.append(("Index (sha256)", f"`{data.sha256}`"))
    return f"## Data\n\n{table(('', ''), rows)}"


def _licence(licence: Mapping[str, object]) -> str:
    name, url = str(licence.get("name")), licence.get("url")
    return f"[{name}]({url})" if isinstance(url, str) else name


def _metrics_section(source: Source) -> str:
    """The rows of evaluation.json, beside the run or in its chain's directory, that are this model's own; empty without any."""
    kind = "student" if source.descriptor.teacher_sha256 else "teacher"
    for file in (source.path / "evaluation.json", source.path.parent / "evaluation.json"):
        if not file.exists():
            continue
        entries = json.loads(file.read_text())
        rows = [
            tuple(_number(entry.get(field)) for field in ("steps", "frechet_distance", "kid", "seconds_per_image"))
            for entry in entries
            if entry.get("model") == kind and (kind == "teacher" or entry.get("steps") == source.descriptor.step_count)
        ]
        if rows:
            head = ("Steps", "Frechet distance", "KID", "Seconds an image")
            network = _plain(entries[0].get("feature_net"))
            own = "halfstep's own" if "-attributes-" in network else "the"
            note = f"By {own} feature net {network}; not comparable with distances of other feature nets."
            return f"## Metrics\n\n{table(head, rows)}\n\n{note}"
    return ""


def _number(value: object) -> str:
    match value:
        case float():
            return f"{value:.4g}"
        case int():
            return str(value)
    return "-"


def _plain(value: object) -> str:
    """Text for a table's cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = (head, ("---",) * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
