"""What latent models are fed: nothing is computed twice that stays the same, and no bit depends on how."""

from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.reading.sample import MicroBatch
from tests.trainer.latents.finished_runs import Bases, recipe
from trainer.adapters.lora import lora_layers
from trainer.draws import draw_latent
from trainer.engines.precision import autocast
from trainer.latents.inputs import build_inputs
from trainer.latents.trained import build_trained
from trainer.models.autoencoder import build_autoencoder
from trainer.plan.from_latent import build, latent_shape

CPU = torch.device("cpu")
LORA = {"kind": "lora", "rank": 2}


def test_the_one_prompt_of_a_run_is_encoded_once(bases: Bases, monkeypatch: pytest.MonkeyPatch) -> None:
    base = bases("stable_diffusion")
    model = {"kind": "stable_diffusion", "base": str(base), "frozen_precision": "fp32"}
    config = recipe(model, adaptation=LORA, dreambooth={"instance_prompt": "a face", "class_prompt": "a head"})
    encoded: list[str] = []
    encode = TextEncoder.encode
    monkeypatch.setattr(TextEncoder, "encode", lambda self, captions: (encoded.extend(captions), encode(self, captions))[1])
    inputs = build_inputs(config, build_trained(config), device=CPU)
    captions = ("a head", "a face", "a face")
    batch = MicroBatch(torch.zeros(3, 3, 16, 16, dtype=torch.uint8), ("0", "1", "2"), captions=captions)
    draws = draw_latent(0, 0, 0, shape=(3, 4, 2, 2), posterior=True, perturbed=False, caption_dropout=0.0)
    draws.caption_dropped[2] = True
    inputs.encode(batch, draws, None)
    _, cond = inputs.encode(batch, draws, None)
    assert sorted(encoded) == ["", "a face", "a head"]
    assert inputs.text is not None
    torch.testing.assert_close(cond["text"], encode(inputs.text, ["a head", "a face", ""]).hidden)


def test_lora_in_bf16_has_the_same_bits_without_casts_to_fp32_and_back(bases: Bases) -> None:
    config = recipe({"kind": "stable_diffusion", "base": str(bases("stable_diffusion"))}, adaptation=LORA)
    module = build_trained(config).module
    layers = lora_layers(module).values()
    assert layers and not any(layer.cast_input_dtype_enabled for layer in layers)

    def gradients() -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        x_t, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 77, 32, generator=generator)
        module.zero_grad()
        with autocast("bf16"):
            module(x_t, torch.tensor([3.0, 500.0]), {"text": text}).sample.float().square().sum().backward()
        return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]

    without = gradients()
    for layer in layers:
        layer.cast_input_dtype_enabled = True
    assert all(map(torch.equal, without, gradients()))


def test_dora_keeps_its_casts(bases: Bases) -> None:
    model = {"kind": "stable_diffusion", "base": str(bases("stable_diffusion"))}
    layers = lora_layers(build_trained(recipe(model, adaptation={**LORA, "dora": True})).module).values()
    assert all(layer.cast_input_dtype_enabled for layer in layers)


def test_latents_do_not_depend_on_how_pixels_lie_in_memory(bases: Bases) -> None:
    vae = LatentEncoder(str(Path(bases("stable_diffusion"))), precision="fp32", device=CPU)
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)) * 2 - 1
    latents = vae.encode_scaled(pixels)
    assert torch.equal(latents, vae.encode_scaled(pixels.contiguous(memory_format=torch.channels_last)))
    with torch.no_grad():
        assert isinstance(vae.module, AutoencoderKL)
        plain = vae.module.encode(pixels, return_dict=False)[0].parameters
    torch.testing.assert_close(latents, plain, rtol=1e-5, atol=1e-5)


def vae_of(channels: int, folder: Path) -> Path:
    """A VAE that shrinks images by 2, in the folder `vae`."""
    build_autoencoder(channels=(8, 8), layers_per_block=1, latent_channels=channels, norm_groups=4, image_size=16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("channels", [1, 8])
def test_a_model_from_scratch_has_the_channels_of_its_autoencoder(tmp_path: Path, channels: int) -> None:
    vae = vae_of(channels, tmp_path / "vae")
    model = {"kind": "latent_base", "autoencoder": str(vae), "channels": [32, 64], "attention": [False, True]}
    config = recipe({**model, "frozen_precision": "fp32"}, engine={"precision": "fp32"})
    trained = build_trained(config)
    inputs = build_inputs(config, trained, device=CPU)
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    batch = MicroBatch(images, ("0", "1"), captions=("a face", "a head"))
    shape = inputs.shape(batch)
    draws = draw_latent(0, 0, 0, shape=shape, posterior=True, perturbed=False, caption_dropout=0.0)
    x_0, cond = inputs.encode(batch, draws, None)
    assert x_0.shape == shape == (2, channels, 8, 8) == (2, *latent_shape(config, 16))
    assert trained.module(x_0, torch.zeros(2), cond).sample.shape == shape
    with torch.device("meta"):
        assert build(config).network.config["in_channels"] == channels


@pytest.mark.parametrize(
    ("channels", "kind", "sections", "wanted"),
    [
        (8, "stable_diffusion", {}, r"8 channels, of which the U-Net wants in_channels=8, and has 4; give a pipeline in model\.base"),
        (1, "stable_diffusion", {}, r"1 channels, of which the U-Net wants in_channels=1, and has 4"),
        (8, "stable_diffusion_inpainting", {"inpainting": {}}, r"wants in_channels=17 to inpaint, and has 9"),
    ],
)
def test_a_base_whose_vae_is_of_other_channels_than_its_unet_is_refused(
    bases: Bases, tmp_path: Path, channels: int, kind: str, sections: dict[str, object], wanted: str
) -> None:
    base = copytree(bases(kind), tmp_path / "base")
    rmtree(base / "vae")
    vae_of(channels, base / "vae")
    config = recipe({"kind": "stable_diffusion", "base": str(base)}, adaptation=LORA, objective={"kind": "latent_denoising", **sections})
    with pytest.raises(ValueError, match=wanted):
        build_inputs(config, build_trained(config), device=CPU)
