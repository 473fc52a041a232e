"""Export: EMA weights as a folder that stock diffusers loads and that draws the same images, whole or absent."""

import logging
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from data_shards import ranks
from data_shards.files import json_text, read_json_object
from trainer.config import AutoencoderConfig, Prediction
from trainer.config_io import dump_yaml, load_recipe
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import respaced_betas
from trainer.export_folder import exported_checkpoint, exported_sha256, is_export, portable_recipe, push_export, seal, write_folder
from trainer.model_card import model_card
from trainer.options import Options, flag, optional_integer, optional_number, optional_text
from trainer.pixel_base import PixelBase
from trainer.sample import draw_images, grid_image, png
from trainer.source import TIME_TABLE, Source, is_latent, load_source, time_table, trained_stages
from trainer.stages import halving_counts
from trainer.stock import is_stock

logger = logging.getLogger(__name__)

MAX_CARD_STEPS = 32
CARD_IMAGES = 8
_PREDICTION_TYPES: dict[Prediction, Literal["epsilon", "sample", "v_prediction"]] = {"v": "v_prediction", "eps": "epsilon", "x_0": "sample"}


def export_job(path: Path, options: Options) -> int:
    """Export a RUN_DIR, or the stage of a chain that samples in `steps` steps, and push it where asked to. Returns the exit code.

    options: out (default: PATH/export), steps (of a chain: required), ema (decay of the average; default: the run's first), merged (of
    a LoRA: folded into its base, a whole pipeline; then `out` is required), push (a Hub repository, owner/name).
    A push that fails is reported and ends with 1; the export itself stays.
    Raises: ValueError for a bad source or target."""
    if not ranks.is_rank_0():
        return 0
    push = optional_text(options, "push")
    if is_export(path) and not is_stock(path):
        raise ValueError(f"{path}: is an export already; give a RUN_DIR or a chain's directory")
    folder = _export_latent(path, options, push) if is_latent(path) else _export_pixels(path, options, push)
    if push is None:
        return 0
    try:
        logger.info("pushed to %s", push_export(folder, push))
    except RuntimeError as error:
        logger.error("%s", error)
        return 1
    return 0


def export_run(run_dir: Path) -> Path:
    """Export a run's newest checkpoint to RUN_DIR/export, unless that holds it already."""
    if is_latent(run_dir):
        return _write_latent(run_dir, run_dir / "export")
    return write_export(load_source(run_dir), run_dir / "export")


def _export_pixels(path: Path, options: Options, push: str | None) -> Path:
    steps = optional_integer(options, "steps")
    if flag(options, "merged"):
        raise ValueError(f"--merged: {path} is no LoRA of a latent model; leave --merged out")
    counts = [stage.steps for stage in trained_stages(path)]
    if counts and steps not in counts:
        asked = "say which" if steps is None else f"none of {steps}"
        raise ValueError(f"{path}: a chain has a model a step count, {asked}: --steps {' or '.join(map(str, counts))}")
    source = load_source(path, steps, ema=optional_number(options, "ema"))
    if steps not in (None, source.descriptor.step_count):
        raise ValueError(f"{path}: samples in {source.descriptor.step_count} steps, not in {steps}; leave --steps out")
    out = optional_text(options, "out")
    if out is None and source.stock:
        raise ValueError(f"{path}: is of others; give the new folder, --out DIR")
    folder = write_export(source, Path(out or source.path / "export"), repository=push)
    logger.info("%s: loads with diffusers, %d steps", folder, source.descriptor.step_count)
    return folder


def _export_latent(path: Path, options: Options, push: str | None) -> Path:
    merged, out = flag(options, "merged"), optional_text(options, "out")
    if optional_integer(options, "steps") is not None:
        raise ValueError(f"--steps: {path} is no chain of halvings; leave --steps out")
    if merged and out is None:
        raise ValueError("--merged: give the new folder, --out DIR; RUN_DIR/export is for the LoRA itself")
    ema = optional_number(options, "ema")
    folder = _write_latent(path, Path(out or path / "export"), merged=merged, ema=ema, repository=push, may_draw=True)
    logger.info("%s: loads with diffusers, README.md says how", folder)
    return folder


def _write_latent(
    run_dir: Path, out: Path, *, merged: bool = False, ema: float | None = None, repository: str | None = None, may_draw: bool = False
) -> Path:
    """What is imported now, pixel models do without."""
    if isinstance(load_recipe(run_dir / "recipe.yaml", ()).model, AutoencoderConfig):
        from trainer.latents.export_autoencoder import export_autoencoder_run

        if merged:
            raise ValueError(f"--merged: {run_dir} is an autoencoder's, without an adapter; leave --merged out")
        return export_autoencoder_run(run_dir, out, ema=ema, repository=repository)
    from trainer.latents.export import export_latent_run

    return export_latent_run(run_dir, out, merged=merged, ema=ema, repository=repository, may_draw=may_draw)


def write_export(source: Source, out: Path, *, repository: str | None = None) -> Path:
    """Write the export of a model to the folder `out`; one that already holds the same weights and descriptor is kept.

    repository: the name that the card's example loads; None for the folder's own.
    Raises: ValueError if `out` is something other than an export, which is never overwritten."""
    same = exported_sha256(out) == source.weights_sha256 and exported_checkpoint(out) == source.checkpoint_sha256
    if same and read_json_object(out / "descriptor.json") == source.descriptor.to_json():
        return out
    if is_export(out):
        logger.info("%s: the export that is there, of other weights or steps, is replaced", out)
    return write_folder(out, lambda folder: _fill(folder, source, name=repository or out.name))


def export_unet(source: Source) -> UNet2DModel:
    """The model as a stock U-Net that is fed level indices 0 ... N - 1.

    A teacher's indices are its original times and nothing changes; a student's are looked up in a learned embedding, whose row k
    is the sinusoid of original time timesteps[k]."""
    timesteps = source.descriptor.timesteps
    if timesteps == tuple(range(len(source.alpha_bar))):
        return source.model
    weights = {**source.model.state_dict(), TIME_TABLE: time_table(source.model, timesteps)}
    # A leading underscore marks diffusers' own notes, one of which would put changed values back to their defaults.
    config = {key: value for key, value in source.model.config.items() if not key.startswith("_")}
    config |= {"time_embedding_type": "learned", "num_train_timesteps": len(timesteps)}
    with torch.device("meta"):
        model = UNet2DModel.from_config(config)
    assert isinstance(model, UNet2DModel), "from_config builds its own class"
    model.load_state_dict(weights, assign=True)
    return model.eval()


def export_pipeline(source: Source) -> DDIMPipeline | DDPMPipeline:
    """The model in the stock pipeline of its sampler, with a scheduler that has the model's own levels and no others.

    With clean images at alpha_bar 1 after level 0, it takes the steps that halfstep's own sampler takes. A base on its own levels, as it
    was or fine-tuned, keeps its scheduler as it is."""
    descriptor, unet = source.descriptor, export_unet(source)
    if descriptor.base is not None and unet is source.model:
        return _base_pipeline(descriptor.base, unet)
    betas = respaced_betas(source.alpha_bar, descriptor.timesteps)
    prediction = _PREDICTION_TYPES[descriptor.prediction_type]
    match descriptor.sampler:
        case "ddim":
            ddim = DDIMScheduler(
                num_train_timesteps=descriptor.step_count,
                trained_betas=betas,
                prediction_type=prediction,
                clip_sample=descriptor.clip,
                timestep_spacing="trailing",
                set_alpha_to_one=True,
            )
            return DDIMPipeline(unet=unet, scheduler=ddim)
        case "ancestral":
            ddpm = DDPMScheduler(
                num_train_timesteps=descriptor.step_count,
                trained_betas=betas,
                prediction_type=prediction,
                clip_sample=descriptor.clip,
                timestep_spacing="trailing",
                variance_type=descriptor.variance,
            )
            return DDPMPipeline(unet=unet, scheduler=ddpm)


def _base_pipeline(base: PixelBase, unet: UNet2DModel) -> DDIMPipeline | DDPMPipeline:
    settings = {name: value for name, value in base.scheduler.items() if not name.startswith("_")}
    match base.sampler:
        case "ddim":
            ddim = DDIMScheduler.from_config(settings)
            assert isinstance(ddim, DDIMScheduler), "from_config builds its own class"
            return DDIMPipeline(unet=unet, scheduler=ddim)
        case "ancestral":
            ddpm = DDPMScheduler.from_config(settings)
            assert isinstance(ddpm, DDPMScheduler), "from_config builds its own class"
            return DDPMPipeline(unet=unet, scheduler=ddpm)


def _fill(folder: Path, source: Source, *, name: str) -> None:
    """Write all files of an export, the manifest last, and wait until the disk holds them."""
    descriptor = source.descriptor
    pipeline = export_pipeline(source)
    pipeline.save_pretrained(folder)
    steps = card_steps(descriptor)
    images = draw_images(source, steps=steps, seed=0, count=CARD_IMAGES)
    source.model.cpu()
    (folder / "samples.png").write_bytes(png(grid_image(images, 4)))
    (folder / "descriptor.json").write_text(json_text(descriptor.to_json()))
    (folder / "recipe.yaml").write_text(dump_yaml(portable_recipe(source.recipe)))
    (folder / "README.md").write_text(model_card(source, name=name, pipeline=type(pipeline).__name__, sample_steps=steps))
    seal(
        folder,
        {"weights_sha256": source.weights_sha256, "checkpoint_sha256": source.checkpoint_sha256, "trained_steps": source.trained_steps},
    )


def card_steps(descriptor: Descriptor) -> int:
    """In how many steps the card's images are drawn: the model's own, or where those take minutes the most of its halvings that do not."""
    return next(count for count in halving_counts(descriptor.step_count, 1) if count <= MAX_CARD_STEPS)
