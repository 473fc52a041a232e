"""What a twin's run exports: stock diffusers loads it and draws what `halfstep sample` draws; kohya's keys of a LoRA come back the same."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from peft import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file

from data_shards.files import read_json_object
from tests.distributed.grid import largest_difference as largest_loss_difference
from tests.models.twins import ENGINES, NAMES, RANKS, REFERENCE, STEPS, TOLERANCE, Twins
from tests.trainer.latents.finished_runs import as_array, largest_difference, run_card, write_inpainting_files
from trainer.checkpoint import read_tensors
from trainer.config import AutoencoderConfig, DdpmConfig, Kandinsky22DecoderConfig, LoraAdaptation, RunConfig, StableDiffusionConfig
from trainer.config_io import load_recipe, recipe_path
from trainer.export_folder import LORA_FILE
from trainer.latents.snippet import prompts_of
from trainer.latents.trained import latent_objective
from trainer.manifest import newest_checkpoint

CONFIGS = {name: load_recipe(recipe_path(name)) for name in NAMES}
DRAWS = [name for name, config in CONFIGS.items() if not isinstance(config.model, AutoencoderConfig | DdpmConfig)]
LORAS = [
    name
    for name in DRAWS
    if isinstance(CONFIGS[name].adaptation, LoraAdaptation) and isinstance(CONFIGS[name].model, StableDiffusionConfig)
]
LEVELS = 2
"""Of 0 ... 255, by which two pictures of the same may differ."""
ALL = pytest.mark.models


@pytest.mark.parametrize("name", [pytest.param(name, marks=ALL) for name in DRAWS])
def test_stock_diffusers_draws_what_the_run_draws(twins: Twins, folder: Path, name: str) -> None:
    config, run_dir, work = CONFIGS[name], twins.run(name, REFERENCE), folder / name
    work.mkdir()
    asked = as_on_the_card(config, work)
    ours = picture(twins.sample(run_dir, work / "run", **asked))
    assert ours.std() > 5
    export = run_dir / "export"
    assert largest_difference(picture(twins.sample(export, work / "export", **asked)), ours) <= LEVELS
    stock = run_card(export, work / "card", bases(twins, config))
    assert largest_difference(stock, ours) <= LEVELS
    if (base := untrained(twins, config)) is not None:
        assert largest_difference(picture(twins.sample(base, work / "base", **asked)), ours) > LEVELS, "nothing was learned"


@pytest.mark.models
def test_a_guided_teacher_is_halved_to_4_steps_alike_on_every_engine_and_stock_diffusers_draws_them(twins: Twins, folder: Path) -> None:
    name, teacher = "latent_halved_tiny", twins.run("latent_base-tiny", REFERENCE)
    runs = {}
    for engine, words in ENGINES.items():
        runs[engine] = twins.folder / f"{name}_{engine}" / "run"
        shutil.rmtree(runs[engine], ignore_errors=True)
        twins.freeze(runs[engine], name, *words, f"objective.halving.teacher={teacher}")
        assert twins.train(runs[engine], ranks=RANKS) == [0] * RANKS, twins.said(runs[engine])
    reference = twins.losses(runs[REFERENCE])
    assert len(reference) == STEPS and reference[-1] < reference[0]
    for engine, run_dir in runs.items():
        assert largest_loss_difference(twins.losses(run_dir), reference) <= TOLERANCE, engine
    config, work = load_recipe(runs[REFERENCE] / "recipe.yaml"), folder / name
    work.mkdir()
    assert config.logging.sample_steps == 4
    ours = picture(twins.sample(runs[REFERENCE], work / "run", **as_on_the_card(config, work)))
    stock = run_card(runs[REFERENCE] / "export", work / "card", bases(twins, config))
    assert largest_difference(stock, ours) <= LEVELS


def as_on_the_card(config: RunConfig, work: Path) -> dict[str, object]:
    """Options of `halfstep sample` that ask for the one picture that the card's example draws."""
    asked: dict[str, object] = {"prompts": [prompts_of(config)[0]], "images": 1}
    if not isinstance(config.model, Kandinsky22DecoderConfig):
        asked |= {"steps": config.logging.sample_steps, "guidance": config.validation.guidance_scale}
    if latent_objective(config).inpainting is not None:
        image, mask = write_inpainting_files(work)
        asked |= {"image": str(image), "mask": str(mask)}
    return asked


def picture(out: Path) -> np.ndarray:
    """The one picture in a folder of `halfstep sample`."""
    [file] = sorted(out.glob("image_*.png"))
    return np.asarray(Image.open(file)).astype(int)


def bases(twins: Twins, config: RunConfig) -> Mapping[str, Path]:
    """What the card's example needs beside the export, by the name that it has there."""
    named = [getattr(config.model, field, None) for field in ("base", "decoder", "prior")]
    found = [twins.folder / "bases" / name.removeprefix("runs/tiny/") for name in named if name is not None]
    return {path.name: path for path in found}


def untrained(twins: Twins, config: RunConfig) -> Path | None:
    """The base, where `halfstep sample` takes it with the same options."""
    return twins.base(Path(config.model.base).name) if isinstance(config.model, StableDiffusionConfig) else None


@pytest.mark.parametrize("name", [pytest.param(name, marks=ALL) for name in LORAS])
def test_kohyas_keys_come_back_the_same_and_draw_the_same(twins: Twins, folder: Path, name: str) -> None:
    config, export = CONFIGS[name], twins.run(name, REFERENCE) / "export"
    [kohya] = export.glob("*_kohya.safetensors")
    keys = set(load_file(kohya))
    assert all(key.startswith("lora_unet_") for key in keys) and any(key.endswith(".alpha") for key in keys)
    work = folder / f"{name}_kohya"
    work.mkdir()
    asked = as_on_the_card(config, work)
    ran = picture(twins.sample(twins.run(name, REFERENCE), work / "run", **asked))
    inpaints = latent_objective(config).inpainting is not None
    kind = StableDiffusionInpaintPipeline if inpaints else StableDiffusionPipeline
    assert isinstance(config.model, StableDiffusionConfig)
    pipeline = kind.from_pretrained(twins.base(Path(config.model.base).name))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(str(export), weight_name=kohya.name)
    came_back = get_peft_model_state_dict(pipeline.unet, adapter_name=pipeline.get_active_adapters()[0])
    ours = {key.removeprefix("unet."): tensor for key, tensor in load_file(export / LORA_FILE).items()}
    assert came_back.keys() == ours.keys() and all(torch.equal(came_back[key], tensor) for key, tensor in ours.items())
    given = {"image": Image.open(work / "image.png"), "mask_image": Image.open(work / "mask.png")} if inpaints else {}
    draw = cast("Callable[..., StableDiffusionPipelineOutput]", pipeline)
    drawn = draw(
        prompts_of(config)[0],
        num_inference_steps=config.logging.sample_steps,
        guidance_scale=config.validation.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(0),
        height=64,
        width=64,
        **given,
    )
    assert largest_difference(as_array([drawn.images[0]])[0], ran) <= LEVELS  # pyright: ignore[reportArgumentType] (a list of images)


@pytest.mark.models
def test_an_autoencoder_gives_back_by_stock_diffusers_what_its_average_gives_back(twins: Twins) -> None:
    run_dir = twins.run("autoencoder-tiny", REFERENCE)
    checkpoint = newest_checkpoint(run_dir)
    assert checkpoint is not None
    vae = AutoencoderKL.from_pretrained(run_dir / "export")
    assert 0.01 < float(read_json_object(run_dir / "export" / "config.json")["scaling_factor"]) < 100  # pyright: ignore[reportArgumentType]
    averaged = {name.removeprefix("vae."): tensor for name, tensor in read_tensors(checkpoint, "ema").items()}
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in vae.state_dict().items())
