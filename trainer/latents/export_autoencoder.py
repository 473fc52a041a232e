"""Exports of autoencoders that were trained here: a folder that stock diffusers loads, its scaling factor measured on training images."""

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from data_shards import ranks
from data_shards.files import json_text
from trainer.checkpoint import read_tensors
from trainer.config import AutoencoderConfig, RunConfig
from trainer.config_io import dump_yaml, load_recipe
from trainer.export_folder import SCHEMA_VERSION, portable_recipe, seal, whole_manifest, write_folder
from trainer.hash import tensors_sha256
from trainer.latents.finished import find_indexes
from trainer.manifest import Checkpoint, newest_checkpoint
from trainer.model_card import HUB_LICENCES, data_section, table
from trainer.models.autoencoder import TrainedAutoencoder, build_autoencoder, latent_scale
from trainer.models.encode import encode_pixels
from trainer.source import average_part, check_tensors
from trainer.training_data import TrainingData

MEASURED_IMAGES = 256
"""Of the training data, for the scaling factor."""


def export_autoencoder_run(run_dir: Path, out: Path, *, ema: float | None = None, repository: str | None = None) -> Path:
    """Write the averaged weights of a run's newest checkpoint to the folder `out`; one that holds the same already is kept.

    ema: picks an average by its decay. repository: the name that the card's example loads; None for the folder's own.
    Raises: ValueError if there is no checkpoint, the training images are no longer there, or `out` is something other than an export."""
    checkpoint = newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(f"{run_dir}: no valid checkpoint under checkpoints/; train it first: halfstep train {run_dir / 'recipe.yaml'}")
    recipe = load_recipe(run_dir / "recipe.yaml", ())
    tensors = read_tensors(checkpoint, average_part(checkpoint, ema))
    facts = {
        "form": "autoencoder",
        "weights_sha256": tensors_sha256(tensors),
        "checkpoint_sha256": checkpoint.sha256,
        "trained_steps": checkpoint.step,
    }
    held = whole_manifest(out)
    if held is not None and all(held.get(name) == value for name, value in facts.items()):
        return out
    vae = _autoencoder(run_dir, recipe, checkpoint, tensors)
    scale = latent_scale(_moments(vae, recipe, run_dir))
    vae.register_to_config(scaling_factor=scale)
    sheet = run_dir / "samples" / f"step_{checkpoint.step:06d}.png"

    def fill(folder: Path) -> None:
        vae.save_pretrained(folder, safe_serialization=True)
        if sheet.is_file():
            (folder / "samples.png").write_bytes(sheet.read_bytes())
        (folder / "descriptor.json").write_text(json_text({"schema_version": SCHEMA_VERSION, **_meaning(checkpoint)}))
        (folder / "recipe.yaml").write_text(dump_yaml(portable_recipe(recipe)))
        card = _card(recipe, run_dir, checkpoint, name=repository or out.name, scale=scale, has_samples=sheet.is_file())
        (folder / "README.md").write_text(card)
        seal(folder, facts)

    return write_folder(out, fill)


def _meaning(checkpoint: Checkpoint) -> dict[str, object]:
    meaning = checkpoint.manifest.get("descriptor")
    assert isinstance(meaning, dict), "a checkpoint's manifest has one"
    return meaning


def _autoencoder(run_dir: Path, recipe: RunConfig, checkpoint: Checkpoint, tensors: dict[str, Tensor]) -> AutoencoderKL:
    model, size = recipe.model, _meaning(checkpoint).get("image_size")
    assert isinstance(model, AutoencoderConfig) and isinstance(size, int), "the caller has looked, and its task says the size"
    with torch.device("meta"):
        vae = build_autoencoder(
            channels=model.channels,
            layers_per_block=model.layers_per_block,
            latent_channels=model.latent_channels,
            norm_groups=model.norm_groups,
            image_size=size,
        )
    module = TrainedAutoencoder(vae)
    check_tensors(run_dir, tensors, module.state_dict())
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False).eval()
    return module.vae


def _moments(vae: AutoencoderKL, recipe: RunConfig, run_dir: Path) -> Iterator[Float[Tensor, "b two_l h w"]]:
    """Of the first training images."""
    device = ranks.device()
    vae.to(device)  # pyright: ignore[reportArgumentType] (diffusers hides torch's signature)
    alone = recipe.model_copy(update={"data": recipe.data.model_copy(update={"workers": 0})})
    batches = TrainingData.open(alone, run_dir).batches(0, MEASURED_IMAGES, range(recipe.micro_batches), pin=False)
    seen = 0
    with torch.no_grad():
        for batch in batches:
            x = encode_pixels(batch.images.to(device), flips=None)
            yield vae.encode(x, return_dict=False)[0].parameters.float().cpu()
            seen += len(x)
            if seen >= MEASURED_IMAGES:
                break
    vae.cpu()


def _card(recipe: RunConfig, run_dir: Path, checkpoint: Checkpoint, *, name: str, scale: float, has_samples: bool) -> str:
    model, size = recipe.model, _meaning(checkpoint)["image_size"]
    assert isinstance(model, AutoencoderConfig), "the caller has looked"
    indexes = find_indexes(recipe, run_dir)
    licences = {str(index.licence.get("name")) for index in indexes}
    header = ["---", "library_name: diffusers", *(f"license: {HUB_LICENCES[each]}" for each in licences if each in HUB_LICENCES)]
    tags = ("halfstep", "diffusers", "diffusers-training", "autoencoder")
    halvings = len(model.channels) - 1
    rows = {
        "Latents": f"{model.latent_channels} channels, {2**halvings} times smaller a side",
        "Scaling factor": f"{scale:.5g}, measured on up to {MEASURED_IMAGES} training images",
        "Optimizer steps": f"{checkpoint.step:,}",
        "Images a step": str(recipe.data.global_batch_size),
        "Optimizer": f"{recipe.optim.kind}, learning rate {recipe.optim.learning_rate:g} ({recipe.lr_schedule.kind})",
        "EMA decay": f"{recipe.ema.decay:g} (these are averaged weights)",
        "Seed": str(recipe.seed),
    }
    code = (
        "import torch",
        "from diffusers import AutoencoderKL",
        "",
        f'vae = AutoencoderKL.from_pretrained("{name}")',
        f"images = torch.zeros(1, 3, {size}, {size})  # in [-1, 1]",
        "latents = vae.encode(images).latent_dist.mean * vae.config.scaling_factor",
        "back = vae.decode(latents / vae.config.scaling_factor).sample",
    )
    sections = [
        "\n".join((*header[:2], *(header[2:] if len(licences) == 1 else ()), "tags:", *(f"- {tag}" for tag in tags), "---")),
        f"# An autoencoder for images of {size} x {size} pixels\n\nTrained from scratch with halfstep, for latent diffusion models.",
        "![Training images above what comes back of them](samples.png)" if has_samples else "",
        "## How to use it\n\n```python\n" + "\n".join(code) + "\n```",
        f"## Recipe\n\n{table(('', ''), tuple(rows.items()))}\n\nThe whole of it is in `recipe.yaml`.",
        *([data_section(index) for index in indexes] or [data_section(None)]),
        "## Limits\n\nIt was shown what its data section says and nothing else: other images come back worse.",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
