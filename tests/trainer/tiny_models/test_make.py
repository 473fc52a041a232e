"""Tiny models: stock libraries load them and draw with them."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDPMPipeline,
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipProcessor, CLIPModel, CLIPProcessor, PreTrainedModel

from data_shards.encoders.image import WuerstchenEncoder, image_encoder
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from trainer.models.deprecated import (
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    WuerstchenDecoderPipeline,
    WuerstchenPrior,
    WuerstchenPriorPipeline,
)
from trainer.tiny_models.kinds import KINDS
from trainer.tiny_models.make import make_tiny, make_tiny_job
from trainer.tiny_models.pipelines import write_component
from trainer.tiny_models.shapes import tiny_architecture

CPU = torch.device("cpu")
Folder = Callable[[str], Path]


def drawn(pipeline: DiffusionPipeline, **inputs: object) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(  # pyright: ignore[reportCallIssue]
        num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0), **inputs
    )
    image = made.images[0]
    assert np.isfinite(image).all()
    assert image.std() > 0.01, "one grey plane"
    return image


def file_hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("kind", "pipeline", "prediction"),
    [
        ("stable_diffusion", StableDiffusionPipeline, "epsilon"),
        ("stable_diffusion_v", StableDiffusionPipeline, "v_prediction"),
        ("stable_diffusion_xl", StableDiffusionXLPipeline, "epsilon"),
    ],
)
def test_text_to_image_draws_what_the_text_says(tiny: Folder, kind: str, pipeline: type[DiffusionPipeline], prediction: str) -> None:
    loaded = DiffusionPipeline.from_pretrained(tiny(kind), local_files_only=True)
    assert type(loaded) is pipeline
    assert loaded.unet.config.in_channels == 4
    assert loaded.scheduler.config.prediction_type == prediction
    cat, car = drawn(loaded, prompt="a cat"), drawn(loaded, prompt="a car")
    assert cat.shape == (64, 64, 3)
    assert np.abs(cat - car).max() > 1e-3


def test_inpainting_takes_nine_channels_at_any_side(tiny: Folder) -> None:
    loaded = StableDiffusionInpaintPipeline.from_pretrained(tiny("stable_diffusion_inpainting"), local_files_only=True)
    assert loaded.unet.config.in_channels == 9
    for side in (64, 128):
        image, mask = Image.new("RGB", (side, side), "red"), Image.new("L", (side, side), 255)
        assert drawn(loaded, prompt="a car", image=image, mask_image=mask, height=side, width=side).shape == (side, side, 3)


def test_a_ddpm_draws_pixels(tiny: Folder) -> None:
    loaded = DiffusionPipeline.from_pretrained(tiny("ddpm"), local_files_only=True)
    assert type(loaded) is DDPMPipeline
    assert (loaded.scheduler.config.variance_type, loaded.scheduler.config.clip_sample) == ("fixed_small", True)
    assert drawn(loaded).shape == (32, 32, 3)


def test_wuerstchen_goes_from_text_to_latents_to_images(tiny: Folder) -> None:
    folder = tiny("wuerstchen_prior")
    prior = WuerstchenPriorPipeline.from_pretrained(folder, local_files_only=True)
    decoder = DiffusionPipeline.from_pretrained(folder / "decoder", local_files_only=True)
    assert type(decoder) is WuerstchenDecoderPipeline
    prior.set_progress_bar_config(disable=True)
    draw = torch.Generator().manual_seed(0)
    images = list[np.ndarray]()
    for text in ("a cat", "a car"):
        latents = prior(text, height=128, width=128, num_inference_steps=2, generator=draw.manual_seed(0))[0]
        assert isinstance(latents, torch.Tensor)
        assert latents.shape == (1, 16, 3, 3)
        images.append(drawn(decoder, image_embeddings=latents, prompt="a cat"))
    cat, car = images
    assert cat.shape == (128, 128, 3)
    assert np.abs(cat - car).max() > 1e-3


def test_wuerstchens_prior_is_far_from_the_pole_of_its_output(tiny: Folder) -> None:
    prior = WuerstchenPrior.from_pretrained(tiny("wuerstchen_prior") / "prior")
    width = int(prior.config["c_cond"])
    noise = torch.randn(8, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        predicted = prior(noise, torch.linspace(0.1, 0.9, 8), torch.zeros(8, 77, width))
    assert predicted.abs().max() < 20


def test_diffusers_042_finds_wuerstchen_by_module_alone(tiny: Folder) -> None:
    index = json.loads((tiny("wuerstchen_prior") / "model_index.json").read_text())
    assert index["prior"] == [WuerstchenPrior.__module__, "WuerstchenPrior"]
    with pytest.raises(AttributeError):  # else the entry can be the one that save_pretrained writes: diffusers
        _ = diffusers.WuerstchenPrior  # pyright: ignore[reportAttributeAccessIssue]


def test_wuerstchens_image_encoder_tells_images_apart(tiny: Folder) -> None:
    encoder = image_encoder(str(tiny("wuerstchen_prior")), precision="fp32", device=CPU)
    assert type(encoder) is WuerstchenEncoder
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    latents = encoder.encode(images)
    assert latents.shape == (2, 16, 2, 2)
    assert 0.1 < float(latents.std()) < 10
    assert float((latents[0] - latents[1]).abs().mean()) > 0.01


def test_kandinsky_goes_from_text_to_embeddings_to_images(tiny: Folder) -> None:
    prior = KandinskyV22PriorPipeline.from_pretrained(tiny("kandinsky22_prior"), local_files_only=True)
    decoder = DiffusionPipeline.from_pretrained(tiny("kandinsky22_decoder"), local_files_only=True)
    assert type(decoder) is KandinskyV22Pipeline
    prior.set_progress_bar_config(disable=True)
    images = list[np.ndarray]()
    for text in ("a cat", "a car"):
        wanted, unwanted = prior(text, num_inference_steps=2, generator=torch.Generator().manual_seed(0), return_dict=False)
        assert wanted.shape == unwanted.shape == (1, 32)
        assert wanted.std() > 0.1, "the embeddings' spread, clip_std, is not set"
        images.append(drawn(decoder, image_embeds=wanted, negative_image_embeds=unwanted, height=64, width=64))
    assert np.abs(images[0] - images[1]).max() > 1e-3


@pytest.mark.parametrize("kind", ["kandinsky22_prior", "kandinsky22_decoder"])
def test_kandinskys_image_encoder_gives_what_its_prior_predicts(tiny: Folder, kind: str) -> None:
    encoder = image_encoder(str(tiny(kind)), precision="fp32", device=CPU)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert encoder.encode(images).shape == (2, 32)


def test_our_encoders_read_the_folders(tiny: Folder) -> None:
    images = torch.zeros((1, 3, 64, 64), dtype=torch.uint8)
    assert LatentEncoder(str(tiny("stable_diffusion")), precision="fp32", device=CPU).encode(images).shape == (1, 8, 8, 8)
    assert LatentEncoder(str(tiny("kandinsky22_decoder")), precision="fp32", device=CPU).encode(images).shape == (1, 4, 8, 8)
    encoder = TextEncoder(str(tiny("wuerstchen_prior")), layer="last", tokens=0, masks=True, precision="fp32", device=CPU)
    assert encoder.encode(["a cartoon portrait of a woman"]).hidden.shape == (1, 77, 32)


def test_the_autoencoder_stands_alone_and_shrinks_by_eight(tiny: Folder) -> None:
    vae = AutoencoderKL.from_pretrained(tiny("autoencoder"), local_files_only=True)
    latents = vae.encode(torch.zeros(1, 3, 64, 64)).latent_dist.mean  # pyright: ignore[reportAttributeAccessIssue]
    assert latents.shape == (1, 4, 8, 8)
    assert vae.decode(latents, return_dict=False)[0].shape == (1, 3, 64, 64)


def test_clip_scores_images_against_texts(tiny: Folder) -> None:
    folder = tiny("clip")
    model, processor = CLIPModel.from_pretrained(folder), CLIPProcessor.from_pretrained(folder)
    assert isinstance(model, PreTrainedModel)
    images = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    texts = ["a red car", "a cat", "a blue car"]
    inputs = processor(text=texts, images=images, padding="max_length", return_tensors="pt")  # pyright: ignore[reportCallIssue]
    with torch.inference_mode():
        scores = model(**inputs).logits_per_image
    assert scores.shape == (2, 3)
    assert scores.isfinite().all()
    assert len(scores.unique()) == 6


def test_blip_captions(tiny: Folder) -> None:
    folder = tiny("blip")
    model, processor = BlipForConditionalGeneration.from_pretrained(folder), BlipProcessor.from_pretrained(folder)
    inputs = processor(images=[Image.new("RGB", (64, 64), "red")], return_tensors="pt")  # pyright: ignore[reportCallIssue]
    words = model.generate(**inputs, max_new_tokens=4)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    assert len(processor.batch_decode(words, skip_special_tokens=True)) == 1


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "wuerstchen_prior"])
def test_the_same_seed_gives_the_same_bytes_whatever_was_drawn_before(tiny: Folder, tmp_path: Path, kind: str) -> None:
    before = torch.random.get_rng_state()
    torch.rand(3)
    assert file_hashes(make_tiny(kind, tmp_path / "again")) == file_hashes(tiny(kind))
    torch.random.set_rng_state(before)


def test_efficient_net_is_the_same_from_the_same_seed(tiny: Folder, tmp_path: Path) -> None:
    write_component(tiny_architecture("wuerstchen_prior").beside["image_encoder"], tmp_path / "again", seed=0)
    assert file_hashes(tmp_path / "again") == file_hashes(tiny("wuerstchen_prior") / "image_encoder")


def test_nothing_random_is_left_behind(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    make_tiny("stable_diffusion", tmp_path / "model")
    assert torch.equal(torch.random.get_rng_state(), before)


def test_another_seed_gives_other_weights_and_the_same_configs(tiny: Folder, tmp_path: Path) -> None:
    other, same = file_hashes(make_tiny("autoencoder", tmp_path / "other", seed=1)), file_hashes(tiny("autoencoder"))
    assert other.keys() == same.keys()
    assert {name for name in same if same[name] != other[name]} == {"diffusion_pytorch_model.safetensors"}


def test_every_folder_is_whole_small_and_free_of_pickles(tiny: Folder) -> None:
    for kind in KINDS:
        files = [path for path in tiny(kind).rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".jinja"}, kind
        small = [path for path in files if "image_encoder" not in path.parts or kind != "wuerstchen_prior"]
        assert sum(path.stat().st_size for path in small) < 5e6, kind
    assert not [path for path in tiny("clip").parent.iterdir() if path.name not in KINDS], "something unfinished was left"


def test_a_tokenizer_is_found_by_its_folder(tiny: Folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny("stable_diffusion_xl") / "tokenizer_2", local_files_only=True)
    assert (tokenizer.pad_token, tokenizer.pad_token_id, tokenizer.model_max_length) == ("!", 0, 77)


def test_a_folder_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="is not empty; give a new or empty folder"):
        make_tiny_job(tmp_path, {"kind": "autoencoder"})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_unknown_kind_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"did you mean stable_diffusion_v.*give one of stable_diffusion, .*, blip"):
        make_tiny_job(tmp_path, {"kind": "stable_diffusion_w"})


def test_the_job_writes_into_an_empty_folder(tmp_path: Path) -> None:
    assert make_tiny_job(tmp_path, {"kind": "autoencoder", "seed": 3}) == 0
    assert (tmp_path / "config.json").is_file()
