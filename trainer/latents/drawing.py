"""Drawing prompts with a finished latent model: a run's, an export of one, or any stock pipeline, by the stock pipelines."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from pathlib import Path
from typing import final

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline

from data_shards import ranks
from data_shards.derive.request import Precision
from data_shards.encoders.files import find_pipeline
from data_shards.encoders.precision import autocast
from data_shards.files import read_json_object
from trainer.adapters.lora import ADAPTER, lora_layers
from trainer.architectures import Component
from trainer.config import Kandinsky22DecoderConfig, Kandinsky22PriorConfig, RunConfig, WuerstchenPriorConfig
from trainer.config_io import load_recipe
from trainer.export_folder import LORA_FILE, is_hub_id, verified_manifest
from trainer.latents.base import find_part
from trainer.latents.finished import Finished, base_name, build_pipeline, load_finished
from trainer.latents.pictures import can_draw, companion_of, sheet_requests
from trainer.latents.sizes import WUERSTCHEN_MULTIPLE, picture_side
from trainer.latents.snippet import TOKEN_FILE, prompts_of
from trainer.latents.trained import latent_objective
from trainer.manifest import newest_checkpoint
from trainer.models.deprecated import WuerstchenPriorPipeline
from trainer.models.from_config import build_scheduler
from trainer.options import Options, integer, optional_number, optional_text
from trainer.prompting.adapter import apply_lora
from trainer.prompting.folder import DECODER_OF, load_pipeline, load_with_decoder, place_parts, reads
from trainer.prompting.painters import painter
from trainer.prompting.pictures import PictureRequest, draw, draw_on_ranks
from trainer.prompting.requests import Asked, asked, requests_from, write_pictures
from trainer.prompting.samplers import choose_sampler
from trainer.prompting.sheet import SheetGroup, draw_sheet
from trainer.sample import chosen_precision, png

logger = getLogger(__name__)

DEFAULT_BATCH_SIZE = 4
_CARD_PROMPTS, _CARD_SEEDS = 4, 2
_HOST = torch.device("cpu")
"""Where pipelines are made: a device may have room for their weights in bf16 alone."""


@final
@dataclass(frozen=True, eq=False)
class Drawer:
    """Stock pipelines."""

    pipeline: DiffusionPipeline
    """The one that draws, or of Wuerstchen and Kandinsky the prior's."""
    decoder: DiffusionPipeline | None
    own: DiffusionPipeline
    """The one of the two that SOURCE is."""
    size: int | None
    """Side in pixels of the images that were learnt from; None leaves it to the pipeline."""
    has_lora: bool


@final
@dataclass(frozen=True)
class Given:
    """What a user says of the models beside SOURCE. None: as the recipe says."""

    base: str | None = None
    """Of a LoRA's export: the folder or Hub id of its base."""
    companion: str | None = None
    """Of a prior its decoder, of a decoder its prior."""
    lora: Path | None = None
    lora_scale: float | None = None
    sampler: str | None = None


def sample_prompts(path: Path, options: Options) -> int:
    """Draw prompts with what is at `path` and write a sheet; returns the exit code.

    options: those of trainer.prompting.requests.asked; out, sampler, precision, batch_size, lora, lora_scale, base (of a LoRA's export),
    decoder (of a prior), prior (of a decoder).
    Raises: ValueError naming what is missing, unknown or of no use to such a model. Collective."""
    wanted, batch_size = asked(options), integer(options, "batch_size", DEFAULT_BATCH_SIZE)
    lora, precision = optional_text(options, "lora"), chosen_precision(options)
    given = Given(
        base=optional_text(options, "base"),
        companion=_companion(options),
        lora=None if lora is None else Path(lora),
        lora_scale=optional_number(options, "lora_scale"),
        sampler=optional_text(options, "sampler"),
    )
    drawer = open_drawer(path, given)
    requests = sized_requests(wanted, drawer)
    _place(drawer, precision)
    paint = painter(drawer.pipeline, drawer.decoder)
    if ranks.is_rank_0():
        logger.info("%s: drawing %d images", path, len(requests))
    started = time.perf_counter()
    with autocast(ranks.device(), precision), torch.no_grad():
        images = draw_on_ranks(paint, requests, batch_size=batch_size)
    seconds = time.perf_counter() - started
    if ranks.is_rank_0():
        written = write_pictures(Path(optional_text(options, "out") or "samples.png"), requests, images, title=path.resolve().name)
        height, width = images.shape[1:3]
        logger.info("%s: %d images of %d x %d, seeds from %d, %.1f seconds", written, len(images), width, height, requests[0].seed, seconds)
    return 0


def sized_requests(wanted: Asked, drawer: Drawer) -> list[PictureRequest]:
    """The pictures that are asked for, of the size of the training images where no other is said.

    Raises: ValueError as requests_from."""
    requests = requests_from(wanted, reads(drawer.pipeline), has_decoder=drawer.decoder is not None)
    size = requests[0].size
    if isinstance(drawer.pipeline, WuerstchenPriorPipeline) and size is not None and any(side % WUERSTCHEN_MULTIPLE for side in size):
        raise ValueError(f"--size {wanted.size}: Wuerstchen draws multiples of {WUERSTCHEN_MULTIPLE} pixels; give one such as 512 or 1024")
    if wanted.size is not None or drawer.size is None:
        return requests
    return [replace(request, size=(drawer.size, drawer.size)) for request in requests]


def _place(drawer: Drawer, precision: Precision) -> None:
    for pipeline in (drawer.pipeline, drawer.decoder):
        if pipeline is not None:
            place_parts(pipeline, device=ranks.device(), precision=precision)


def open_drawer(path: Path, given: Given) -> Drawer:
    """The pipelines of a RUN_DIR, of an export of halfstep, or of a stock pipeline's folder; on the host.

    Raises: ValueError if there is none, or what is given beside it is of no use."""
    if (path / "descriptor.json").is_file() and (path / "manifest.json").is_file():
        drawer = _of_export(path, given)
    elif (path / "model_index.json").is_file():
        _refuse_base(path, given)
        drawer = _joined(path, given.companion, None)
    else:
        drawer = _of_run(path, given)
    if given.lora is not None:
        if drawer.has_lora:
            raise ValueError(f"--lora {given.lora}: {path} is a LoRA already; give its base, or its --merged export, as SOURCE")
        apply_lora(drawer.own, given.lora, scale=1.0 if given.lora_scale is None else given.lora_scale)
    elif given.lora_scale is not None and not drawer.has_lora:
        raise ValueError(f"--lora-scale {given.lora_scale:g}: {path} has no LoRA; give one with --lora FILE, or leave it out")
    if given.sampler is not None:
        choose_sampler(drawer.pipeline, given.sampler)
    return drawer


def draw_card_pictures(finished: Finished, pipeline: DiffusionPipeline) -> bytes | None:
    """A sheet of a few pictures for a card, as PNG; None where the recipe does not say what is needed to draw any."""
    recipe = finished.recipe
    if latent_objective(recipe).inpainting is not None or not can_draw(recipe):
        return None
    drawer = _around(finished, pipeline, companion_of(recipe))
    _place(drawer, "fp32")
    prompts = prompts_of(recipe)[:_CARD_PROMPTS]
    seeds = [recipe.validation.seed + number for number in range(_CARD_SEEDS)]
    requests = sheet_requests(recipe, prompts, seeds, size=None if drawer.size is None else (drawer.size, drawer.size))
    with torch.no_grad():
        images = draw(painter(drawer.pipeline, drawer.decoder), requests, batch_size=DEFAULT_BATCH_SIZE)
    title = f"step {finished.checkpoint.step}"
    return png(draw_sheet(prompts, [SheetGroup(title, images.unflatten(0, (len(prompts), len(seeds))))], seeds=seeds))


def _of_run(run_dir: Path, given: Given) -> Drawer:
    _refuse_base(run_dir, given)
    finished = load_finished(run_dir)
    pipeline = build_pipeline(finished)
    if given.lora is None and given.lora_scale is not None:
        models = [model for model in (finished.network, finished.text_encoder) if model is not None]
        for layer in [layer for model in models for layer in lora_layers(model).values()]:
            layer.set_scale(ADAPTER, given.lora_scale)
    return _around(finished, pipeline, given.companion or companion_of(finished.recipe))


def _around(finished: Finished, pipeline: DiffusionPipeline, companion: str | None) -> Drawer:
    """A run's pipeline with the one that it draws together with."""
    size = picture_side(finished.recipe, finished.image_size)
    match finished.recipe.model:
        case WuerstchenPriorConfig() | Kandinsky22PriorConfig():
            if companion is None:
                raise ValueError(f"{finished.path}: is a prior, whose images a decoder draws; give that one's folder, --decoder DIR")
            other = load_pipeline(find_pipeline(companion), device=_HOST)
            return Drawer(pipeline, other, pipeline, size, finished.is_lora)
        case Kandinsky22DecoderConfig():
            assert companion is not None, "the recipe names a prior"
            other = load_pipeline(find_pipeline(companion), device=_HOST)
            return Drawer(other, pipeline, pipeline, size, finished.is_lora)
        case _:
            if companion is not None:
                raise ValueError(f"{finished.path}: draws on its own; leave {companion} out")
            return Drawer(pipeline, None, pipeline, size, finished.is_lora)


def _of_export(folder: Path, given: Given) -> Drawer:
    manifest, recipe = verified_manifest(folder), load_recipe(folder / "recipe.yaml", ())
    size = manifest.get("image_size")
    size = picture_side(recipe, size if isinstance(size, int) else None)
    here = _recipe_here(folder, manifest)
    companion = given.companion or (None if here is None else companion_of(here)) or _reachable(companion_of(recipe))
    if manifest.get("form") != "lora":
        _refuse_base(folder, given)
        return _joined(folder, companion, size)
    base, revision = (given.base, None) if given.base is not None else base_name(here or recipe)
    if _reachable(base) is None:
        raise ValueError(f"{folder}: is a LoRA for {base}, which is not here; give its base, --base DIR")
    pipeline = _lora_on_base(folder, recipe, base, revision)
    apply_lora(pipeline, folder / LORA_FILE, scale=1.0 if given.lora_scale is None else given.lora_scale)
    if isinstance(recipe.model, WuerstchenPriorConfig | Kandinsky22PriorConfig | Kandinsky22DecoderConfig):
        if companion is None:
            raise ValueError(
                f"{folder}: draws together with a second model; give its folder, --decoder DIR of a prior, --prior DIR of a decoder"
            )
        other = load_pipeline(find_pipeline(companion), device=_HOST)
        pair = (other, pipeline) if isinstance(recipe.model, Kandinsky22DecoderConfig) else (pipeline, other)
        return Drawer(*pair, pipeline, size, True)
    return Drawer(pipeline, None, pipeline, size, True)


def _lora_on_base(folder: Path, recipe: RunConfig, base: str, revision: str | None) -> DiffusionPipeline:
    """The base as the adapter wants it: the pipeline of its task, the trained scheduler, the new token. Its network is compared."""
    found = find_part(
        base, "prior" if isinstance(recipe.model, WuerstchenPriorConfig | Kandinsky22PriorConfig) else "unet", revision=revision
    )
    wanted = read_json_object(folder / "descriptor.json").get("base_sha256")
    if found.sha256 != wanted:
        raise ValueError(f"{folder}: was trained on a base of sha256 {wanted}, {base} has {found.sha256}; give the right one, --base DIR")
    pipeline = load_pipeline(find_pipeline(base, revision=revision), device=_HOST)
    if latent_objective(recipe).inpainting is not None and isinstance(pipeline, StableDiffusionPipeline):
        pipeline = StableDiffusionInpaintPipeline(**pipeline.components, requires_safety_checker=False)  # pyright: ignore[reportArgumentType]
    if (folder / "scheduler").is_dir():
        config = read_json_object(folder / "scheduler" / "scheduler_config.json")
        settings = {name: value for name, value in config.items() if not name.startswith("_")}
        pipeline.scheduler = build_scheduler(Component("diffusers", str(config.get("_class_name")), settings))
    if (folder / TOKEN_FILE).is_file():
        assert isinstance(pipeline, StableDiffusionPipeline | StableDiffusionInpaintPipeline), "new tokens are Stable Diffusion's"
        pipeline.load_textual_inversion(str(folder), weight_name=TOKEN_FILE, local_files_only=True, use_safetensors=True)
    return pipeline


def _joined(folder: Path, companion: str | None, size: int | None) -> Drawer:
    """A whole pipeline with the one that it draws together with."""
    name = read_json_object(folder / "model_index.json").get("_class_name")
    if companion is None and name in DECODER_OF:
        raise ValueError(f"{folder}: is a prior, whose images a {DECODER_OF[str(name)]} draws; give that one's folder, --decoder DIR")
    if companion is None and name in DECODER_OF.values():
        raise ValueError(f"{folder}: is a decoder, which is told what to draw by its prior; give that one's folder, --prior DIR")
    other = None if companion is None else find_pipeline(companion)
    first, second = load_with_decoder(folder, other, device=_HOST)
    own = second if second is not None and name in DECODER_OF.values() else first
    return Drawer(first, second, own, size, False)


def _recipe_here(folder: Path, manifest: Mapping[str, object]) -> RunConfig | None:
    """The recipe of the run that an export still lies in, which names models by where they are."""
    run_dir = folder.resolve().parent
    if not (run_dir / "recipe.yaml").is_file():
        return None
    of_run = any(checkpoint.sha256 == manifest.get("checkpoint_sha256") for checkpoint in [newest_checkpoint(run_dir)] if checkpoint)
    return load_recipe(run_dir / "recipe.yaml", ()) if of_run else None


def _reachable(name: str | None) -> str | None:
    """A model's name if it is a folder here or of the Hub; exports keep but the last name of a folder."""
    return name if name is not None and (Path(name).is_dir() or is_hub_id(name)) else None


def _refuse_base(path: Path, given: Given) -> None:
    if given.base is not None:
        raise ValueError(f"--base {given.base}: {path} is no LoRA's export and needs none; leave --base out")


def _companion(options: Options) -> str | None:
    decoder, prior = optional_text(options, "decoder"), optional_text(options, "prior")
    if decoder is not None and prior is not None:
        raise ValueError(f"--decoder {decoder} and --prior {prior}: SOURCE is one of the two; give the other alone")
    return decoder or prior
