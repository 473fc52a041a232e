"""Exports of latent runs: a whole stock pipeline, or an adapter's files, with averaged weights and a card; whole or absent."""

import logging
import re
from pathlib import Path
from typing import Literal

from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from data_shards.files import json_text, read_json_object
from trainer.adapters.lora_files import write_diffusers, write_kohya
from trainer.adapters.tokens import write_token
from trainer.config import LatentBaseConfig, StableDiffusionConfig
from trainer.config_io import dump_yaml
from trainer.export_folder import SCHEMA_VERSION, portable_recipe, seal, whole_manifest, write_folder
from trainer.latents.card import CardFacts, latent_card
from trainer.latents.drawing import draw_card_pictures
from trainer.latents.finished import Finished, build_pipeline, load_finished
from trainer.latents.sizes import picture_side
from trainer.latents.snippet import TOKEN_FILE, Exported, Form, needs_scheduler, usage_code
from trainer.models.wuerstchen import loadable_index
from trainer.source import average_part

logger = logging.getLogger(__name__)

SAMPLES_FILE = "samples.png"


def export_latent_run(
    run_dir: Path,
    out: Path,
    *,
    merged: bool = False,
    ema: float | None = None,
    repository: str | None = None,
    may_draw: bool = False,
) -> Path:
    """Write the newest checkpoint's model to the folder `out`: an adapter as such, anything else as a pipeline.

    One that holds the same already is kept. merged: an adapter is folded into its base, a whole pipeline, too. ema: picks an average
    by its decay. repository: the name that the card's example loads; None for the folder's own. may_draw: pictures for the card are
    drawn where the run has drawn none of these weights.
    Raises: ValueError if there is nothing to export, or `out` is something other than an export."""
    finished = load_finished(run_dir, ema=ema)
    if merged and not finished.is_lora:
        raise ValueError(f"--merged: {run_dir} trained all weights, there is no adapter to merge; leave --merged out")
    form: Form = "lora" if finished.is_lora and not merged else "pipeline"
    facts = {
        "form": form,
        "weights_sha256": finished.weights_sha256,
        "checkpoint_sha256": finished.checkpoint.sha256,
        "trained_steps": finished.checkpoint.step,
        "image_size": finished.image_size,
    }
    held = whole_manifest(out)
    if held is not None and all(held.get(name) == value for name, value in facts.items()):
        return out
    sheet = run_dir / "samples" / f"step_{finished.checkpoint.step:06d}.png"
    shown = sheet.read_bytes() if sheet.is_file() and average_part(finished.checkpoint, ema) == "ema" else None

    side = picture_side(finished.recipe, finished.image_size)

    def fill(folder: Path) -> None:
        folder.mkdir(parents=True)
        pipeline = build_pipeline(finished, merged=merged) if form == "pipeline" else _write_lora(folder, finished)
        if form == "pipeline":
            _write_pipeline(folder, pipeline)
        samples = shown or (draw_card_pictures(finished, pipeline) if may_draw else None)
        if samples is not None:
            (folder / SAMPLES_FILE).write_bytes(samples)
        kind = None if samples is None else "sheet" if shown else "drawn"
        exported = Exported(
            finished.recipe,
            form,
            name=repository or out.name,
            image_size=side,
            has_token=finished.token is not None,
            pipeline=type(pipeline).__name__,
            scheduler=type(pipeline.scheduler).__name__,
        )
        _write_papers(folder, finished, exported, samples=kind)
        seal(folder, facts)

    return write_folder(out, fill)


def _write_papers(folder: Path, finished: Finished, exported: Exported, *, samples: Literal["sheet", "drawn"] | None) -> None:
    """Card, recipe, and what the weights mean."""
    (folder / "descriptor.json").write_text(json_text({"schema_version": SCHEMA_VERSION, **finished.meaning}))
    (folder / "recipe.yaml").write_text(dump_yaml(portable_recipe(finished.recipe)))
    code = usage_code(exported)
    files = tuple(sorted(path.name for path in folder.iterdir()))
    card = CardFacts(finished, form=exported.form, code=code, samples=samples, files=files)
    (folder / "README.md").write_text(latent_card(card))


def _write_pipeline(folder: Path, pipeline: DiffusionPipeline) -> None:
    pipeline.save_pretrained(folder, safe_serialization=True)
    # diffusers does not find Wuerstchen's classes by the names that it writes.
    index = loadable_index(read_json_object(folder / "model_index.json"))
    (folder / "model_index.json").write_text(json_text(_without_paths(index)))
    for file in folder.glob("*/*config.json"):
        config = read_json_object(file)
        if config != _without_paths(config):
            file.write_text(json_text(_without_paths(config)))


def _without_paths(config: dict[str, object]) -> dict[str, object]:
    """A configuration without where on this machine it was loaded from."""
    return {key: value for key, value in config.items() if key not in ("_name_or_path", "name_or_path")}


def _write_lora(folder: Path, finished: Finished) -> DiffusionPipeline:
    """The adapter in both forms, the new token, and the scheduler if it is not the base's."""
    parts = finished.adapters()
    write_diffusers(folder, parts)
    if isinstance(finished.recipe.model, LatentBaseConfig | StableDiffusionConfig):
        run = re.sub(r"[^\w.-]+", "_", finished.path.resolve().name)
        write_kohya(folder / f"{run}_kohya.safetensors", parts)
    if finished.token is not None:
        write_token(folder / TOKEN_FILE, *finished.token)
    pipeline = build_pipeline(finished)
    if needs_scheduler(finished.recipe):
        pipeline.scheduler.save_pretrained(folder / "scheduler")
    return pipeline
