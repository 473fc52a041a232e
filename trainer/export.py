"""Export: EMA weights as a folder that stock diffusers loads and that draws the same images, whole or absent."""

import logging
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Literal

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
from diffusers.pipelines.ddpm.pipeline_ddpm import DDPMPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from data_shards import ranks
from data_shards.files import content_record, fsync_directory, json_text, read_json_object, write_durable
from trainer.config import Prediction, ProgressiveDistillationConfig, RunConfig
from trainer.config_io import dump_yaml
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import respaced_betas
from trainer.model_card import model_card
from trainer.options import Options, optional_integer, optional_number, optional_text
from trainer.sample import draw_images, grid_image, png
from trainer.source import TIME_TABLE, Source, load_source, time_table, verified_contents
from trainer.stages import halving_counts

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
MAX_CARD_STEPS = 32
CARD_IMAGES = 8
_PREDICTION_TYPES: dict[Prediction, Literal["epsilon", "sample", "v_prediction"]] = {"v": "v_prediction", "eps": "epsilon", "x_0": "sample"}


def export_job(path: Path, options: Options) -> int:
    """Export a RUN_DIR, or the stage of a chain that samples in `steps` steps, and push it where asked to. Returns the exit code.

    options: out (default: PATH/export), steps (of a chain: required), ema (decay of the average; default: the run's first), push (a
    Hub repository, owner/name).
    A push that fails is reported and ends with 1; the export itself stays.
    Raises: ValueError for a bad source or target."""
    if not ranks.is_rank_0():
        return 0
    steps, push = optional_integer(options, "steps"), optional_text(options, "push")
    if (path / "model_index.json").exists():
        raise ValueError(f"{path}: is an export already; give a RUN_DIR or a chain's directory")
    source = load_source(path, steps, ema=optional_number(options, "ema"))
    if steps is not None and source.descriptor.step_count != steps:
        raise ValueError(
            f"{path}: no model samples in {steps} steps there, {source.path} takes {source.descriptor.step_count}; export that or --steps"
        )
    if steps is None and source.path != path:
        raise ValueError(f"{path}: a chain has a model per step count; say which one: --steps N")
    folder = write_export(source, Path(optional_text(options, "out") or source.path / "export"), repository=push)
    logger.info("%s: loads with diffusers, %d steps", folder, source.descriptor.step_count)
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
    return write_export(load_source(run_dir), run_dir / "export")


def exported_sha256(folder: Path) -> str | None:
    """sha256 of the weights that an export holds; None where there is no whole export."""
    return _fact(folder, "weights_sha256")


def exported_checkpoint(folder: Path) -> str | None:
    """sha256 of the checkpoint that an export was made from; None where there is no whole export of one."""
    return _fact(folder, "checkpoint_sha256")


def _fact(folder: Path, name: str) -> str | None:
    try:
        manifest = read_json_object(folder / "manifest.json")
        verified_contents(folder, manifest)
    except ValueError:
        return None
    digest = manifest.get(name)
    return digest if isinstance(digest, str) else None


def write_export(source: Source, out: Path, *, repository: str | None = None) -> Path:
    """Write the export of a model to the folder `out`; one that already holds the same weights and descriptor is kept.

    repository: the name that the card's example loads; None for the folder's own.
    Raises: ValueError if `out` is something other than an export, which is never overwritten."""
    same = exported_sha256(out) == source.weights_sha256 and exported_checkpoint(out) == source.checkpoint_sha256
    if same and read_json_object(out / "descriptor.json") == source.descriptor.to_json():
        return out
    if out.exists() and not (out / "model_index.json").exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is not an export and not empty; give --out another name or move it away")
    out.parent.mkdir(parents=True, exist_ok=True)
    for leftover in out.parent.glob(f".{out.name}.tmp-*"):
        shutil.rmtree(leftover)
    temporary = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex}")
    try:
        _fill(temporary, source, name=repository or out.name)
        _commit(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return out


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

    With clean images at alpha_bar 1 after level 0, it takes the steps that halfstep's own sampler takes."""
    descriptor, unet = source.descriptor, export_unet(source)
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


def push_export(folder: Path, repository: str, *, endpoint: str | None = None) -> str:
    """Upload an export to a model repository of the Hugging Face Hub, made where there is none; returns its address.

    endpoint: the Hub's address; None for huggingface_hub's own. The token is that of `hf auth login` or of the environment; it is
    read by huggingface_hub alone.
    Raises: RuntimeError if the Hub cannot be reached or refuses; ValueError if `repository` is not owner/name."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise RuntimeError("--push needs huggingface_hub: pip install 'halfstep[hub]'") from error
    try:
        hub = huggingface_hub.HfApi(endpoint=endpoint)
        hub.create_repo(repository, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Export by halfstep")
    except HFValidationError as error:
        raise ValueError(f"--push {repository}: wanted owner/name: {_first_line(error)}") from error
    # The Hub's client has two transports with unrelated exceptions; whatever went wrong, the export itself is whole.
    except Exception as error:
        raise RuntimeError(
            f"--push {repository}: the Hub was not reached or refused: {type(error).__name__}: {_first_line(error)}; "
            f"the export is complete in {folder}: log in with `hf auth login`, then run the same command again"
        ) from None
    return f"https://huggingface.co/{repository}"


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
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "weights_sha256": source.weights_sha256,
        "checkpoint_sha256": source.checkpoint_sha256,
        "trained_steps": source.trained_steps,
        "files": {file: content_record((folder / file).read_bytes()) for file in names},
    }
    write_durable(folder / "manifest.json", json_text(manifest).encode())
    # fsync of a file is the same call as of a directory: on the descriptor of whatever the name opens.
    for path in (*folder.rglob("*"), folder):
        fsync_directory(path)


def card_steps(descriptor: Descriptor) -> int:
    """In how many steps the card's images are drawn: the model's own, or where those take minutes the most of its halvings that do not."""
    return next(count for count in halving_counts(descriptor.step_count, 1) if count <= MAX_CARD_STEPS)


def portable_recipe(recipe: RunConfig) -> RunConfig:
    """A recipe to hand on: of data and teacher the folders' names, not where they lie on this machine."""
    shards = recipe.data.shards and Path(recipe.data.shards).name
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"shards": shards})})
    if not isinstance(recipe.objective, ProgressiveDistillationConfig):
        return recipe
    teacher = Path(recipe.objective.teacher).name
    return recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"teacher": teacher})})


def _commit(temporary: Path, out: Path) -> None:
    """Give a finished folder its name; an older export there is moved aside first and deleted last."""
    older = out.with_name(f".{out.name}.tmp-{uuid.uuid4().hex}-older")
    if out.exists():
        os.rename(out, older)
    os.rename(temporary, out)
    fsync_directory(out.parent)
    shutil.rmtree(older, ignore_errors=True)


def _first_line(error: Exception) -> str:
    """The first line of a message, without anything that looks like a token."""
    lines = str(error).strip().splitlines()
    return re.sub(r"hf_\w+", "hf_...", lines[0]) if lines else "no reason given"
