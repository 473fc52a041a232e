"""Exports of autoencoder runs: a stock AutoencoderKL with averaged weights and the scaling factor of its own latents."""

from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from jaxtyping import Float
from torch import Tensor

from data_shards.files import json_text
from trainer.checkpoint import read_tensors
from trainer.config import AutoencoderConfig, RunConfig
from trainer.config_io import dump_yaml, load_recipe
from trainer.export_folder import SCHEMA_VERSION, portable_recipe, seal, whole_manifest, write_folder
from trainer.hash import tensors_sha256
from trainer.manifest import newest_checkpoint
from trainer.models.autoencoder import latent_scale
from trainer.models.encode import encode_pixels
from trainer.source import average_part, check_tensors
from trainer.tasks.autoencoder import new_autoencoder
from trainer.training_data import TrainingData

SCALE_IMAGES = 256
"""Training images whose latents say the scaling factor."""
_BATCH = 16


def export_autoencoder_run(run_dir: Path, out: Path, *, ema: float | None = None) -> Path:
    """Write the newest checkpoint's averaged weights to the folder `out`; one that holds the same already is kept.

    ema: picks an average by its decay. Raises: ValueError if there is no checkpoint, or `out` is something other than an export."""
    recipe, checkpoint = load_recipe(run_dir / "recipe.yaml", ()), newest_checkpoint(run_dir)
    if checkpoint is None:
        raise ValueError(f"{run_dir}: no valid checkpoint under checkpoints/; train it first with the same command")
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
    data = TrainingData.open(recipe, run_dir)
    vae = _autoencoder(run_dir, recipe, tensors, data)
    sheet = run_dir / "samples" / f"step_{checkpoint.step:06d}.png"

    def fill(folder: Path) -> None:
        vae.save_pretrained(folder, safe_serialization=True)
        if sheet.is_file():
            (folder / "samples.png").write_bytes(sheet.read_bytes())
        meaning = checkpoint.manifest.get("descriptor")
        assert isinstance(meaning, dict), "a checkpoint's manifest has one"
        (folder / "descriptor.json").write_text(json_text({"schema_version": SCHEMA_VERSION, **meaning}))
        (folder / "recipe.yaml").write_text(dump_yaml(portable_recipe(recipe)))
        (folder / "README.md").write_text(_card(recipe, vae, data, name=out.name, steps=checkpoint.step, has_samples=sheet.is_file()))
        seal(folder, facts)

    return write_folder(out, fill)


@torch.no_grad()
def _autoencoder(run_dir: Path, recipe: RunConfig, tensors: dict[str, Tensor], data: TrainingData) -> AutoencoderKL:
    """The averaged autoencoder with the scaling factor of its latents in its configuration."""
    assert isinstance(recipe.model, AutoencoderConfig), "the dispatch asks for it"
    module = new_autoencoder(recipe, recipe.model, data.image_size).requires_grad_(False).eval()
    check_tensors(run_dir, tensors, dict(module.named_parameters()))
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[name])
    images = data.examples(SCALE_IMAGES).images

    def moments() -> Iterator[Float[Tensor, "b two_l h w"]]:
        for batch in images.split(_BATCH):
            yield module.vae.encode(encode_pixels(batch, flips=None), return_dict=False)[0].parameters

    module.vae.register_to_config(scaling_factor=round(latent_scale(moments()), 6))
    return module.vae


def _card(recipe: RunConfig, vae: AutoencoderKL, data: TrainingData, *, name: str, steps: int, has_samples: bool) -> str:
    sources = ", ".join(dict.fromkeys(str(index.source.get("name", index.root.name)) for index in data.indexes))
    licences = ", ".join(dict.fromkeys(str(index.licence.get("name", "not stated")) for index in data.indexes))
    down = 2 ** (len(vae.config["block_out_channels"]) - 1)
    picture = "\n![Training images, and what comes back of them.](samples.png)\n" if has_samples else ""
    return f"""---
library_name: diffusers
tags: [diffusers-training, autoencoder]
---

# {name}

An autoencoder (AutoencoderKL) trained from scratch by halfstep: images of {data.image_size} pixels to latents of {vae.config["latent_channels"]}
channels, {down} times smaller each way, and back. Latents are multiplied by {vae.config["scaling_factor"]}, 1 / their standard deviation
over {SCALE_IMAGES} training images.
{picture}
```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained("{name}")
```

Trained for {steps} steps of {recipe.data.global_batch_size} images ({sources}; licence of the data: {licences}); averaged weights of decay
{recipe.ema.decay:g}. recipe.yaml has all settings. It has seen no other kind of images.
"""
