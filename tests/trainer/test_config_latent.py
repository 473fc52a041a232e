"""Recipes of latent models: what follows from the model, what is refused and in which words."""

from pathlib import Path

import pytest

from trainer.config import LatentBaseConfig, LoraAdaptation, RunConfig, StableDiffusionConfig, identity, pixel_model, pixel_objective
from trainer.config_io import RecipeErrors, dump_yaml, load_recipe
from trainer.config_latent import LatentDenoisingConfig

LEAST = "data: {shards: shards}\ntrain: {steps: 100}\n"
SD = "model: {kind: stable_diffusion}\n"
FAMILIES = {
    "autoencoder": ("autoencoding", "cosine_clamped"),
    "latent_base": ("latent_denoising", "scaled_linear"),
    "stable_diffusion": ("latent_denoising", "base"),
    "wuerstchen_prior": ("latent_denoising", "base"),
    "kandinsky22_prior": ("latent_denoising", "base"),
    "kandinsky22_decoder": ("latent_denoising", "base"),
}


def load(folder: Path, text: str, *overrides: str) -> RunConfig:
    path = folder / "recipe.yaml"
    path.write_text(LEAST + text, encoding="utf-8")
    return load_recipe(path, overrides)


def mistakes_of(folder: Path, text: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load(folder, text, *overrides)
    return str(caught.value).replace(str(folder / "recipe.yaml"), "FILE").splitlines()


@pytest.mark.parametrize("kind", FAMILIES)
def test_objective_and_noise_follow_the_model(kind: str, tmp_path: Path) -> None:
    given = ", autoencoder: vae" if kind == "latent_base" else ""
    config = load(tmp_path, f"model: {{kind: {kind}{given}}}\n")
    assert (config.objective.kind, config.noise_schedule.kind) == FAMILIES[kind]
    (tmp_path / "frozen.yaml").write_text(dump_yaml(config))
    assert load_recipe(tmp_path / "frozen.yaml") == config


def test_a_section_that_is_written_goes_before_the_default_of_the_family(tmp_path: Path) -> None:
    config = load(tmp_path, "model: {kind: latent_base, autoencoder: vae}\nnoise_schedule: {kind: cosine}\n")
    assert config.noise_schedule.kind == "cosine" and config.objective.kind == "latent_denoising"


def test_an_override_of_the_model_changes_its_defaults_too(tmp_path: Path) -> None:
    config = load(tmp_path, "", "model.kind=stable_diffusion", "adaptation.kind=lora", "adaptation.rank=16")
    assert isinstance(config.model, StableDiffusionConfig) and isinstance(config.objective, LatentDenoisingConfig)
    assert isinstance(config.adaptation, LoraAdaptation) and config.adaptation.rank == 16


@pytest.mark.parametrize("written", [False, True])
def test_a_key_of_a_section_that_names_no_kind_is_of_the_familys_kind(written: bool, tmp_path: Path) -> None:
    if written:
        config = load(tmp_path, SD + "objective: {caption_dropout: 0.1, inpainting: {}}\n")
    else:
        config = load(tmp_path, SD, "objective.caption_dropout=0.1", "objective.inpainting={}")
    assert isinstance(config.objective, LatentDenoisingConfig)
    assert config.objective.caption_dropout == 0.1 and config.objective.inpainting is not None
    given = {"data": {"shards": "x"}, "train": {"steps": 1}, "model": {"kind": "stable_diffusion"}, "objective": {"offset_noise": 0.1}}
    assert RunConfig.model_validate(given).objective.kind == "latent_denoising"


def test_where_a_base_lies_and_validation_are_no_part_of_a_runs_identity(tmp_path: Path) -> None:
    """Of the base the checkpoints remember the weights' sha256."""
    config = load(tmp_path, SD)
    for free in ("validation.seed=3", "validation.prompts=[a couple]", "model.revision=abc", "model.base=elsewhere"):
        assert identity(load(tmp_path, SD, free)) == identity(config)
    for kept in ("adaptation.kind=lora", "objective.offset_noise=0.1", "model.train_text_encoder=true", "model.frozen_precision=fp32"):
        assert identity(load(tmp_path, SD, kept)) != identity(config)


def test_a_pixel_models_code_refuses_a_latent_recipe(tmp_path: Path) -> None:
    config = load(tmp_path, SD)
    with pytest.raises(ValueError, match=r"model.kind=stable_diffusion does not start from scratch on pixels; wanted model.kind=tiny_unet"):
        pixel_model(config)
    with pytest.raises(ValueError, match=r"objective.kind=latent_denoising is a latent model's; wanted objective.kind=denoising"):
        pixel_objective(config)


def test_a_small_base_has_77_tokens_unless_told_otherwise(tmp_path: Path) -> None:
    model = load(tmp_path, "model: {kind: latent_base, autoencoder: vae, text_tokens: 32}\n").model
    assert isinstance(model, LatentBaseConfig) and model.text_tokens == 32 and model.text_width == 128


def test_settings_of_class_images_are_free_where_a_frozen_recipe_repeats_their_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, SD + "dreambooth: {instance_prompt: a cartoon}\n")
    (tmp_path / "frozen.yaml").write_text(dump_yaml(config))
    assert "prior_weight: 1.0" in dump_yaml(config) and load_recipe(tmp_path / "frozen.yaml") == config


CLASSES = SD + "dreambooth: {class_prompt: a cartoon, class_images: 4}\n"
MISTAKES = {
    "an unknown key": ("model: {kind: stable_diffusion, bases: x}", [], "FILE:3: model.bases: unknown key - did you mean 'model.base'?"),
    "a key of another family": (
        "model: {kind: wuerstchen_prior, train_text_encoder: true}", [],
        "FILE:3: model.train_text_encoder: unknown key; it belongs to model.kind=stable_diffusion",
    ),
    "an unknown family": (
        "model: {kind: stable_difusion}", [],
        "FILE:3: model.kind: got 'stable_difusion', wanted one of tiny_unet, ddpm, autoencoder, latent_base, stable_diffusion, "
        "wuerstchen_prior, kandinsky22_prior, kandinsky22_decoder - did you mean 'stable_diffusion'?",
    ),
    "an unknown key of an adapter": (
        SD + "adaptation: {kind: lora, rang: 4}", [], "FILE:4: adaptation.rang: unknown key - did you mean 'adaptation.rank'?"
    ),
    "an unknown key of masks": (
        SD, ["objective.inpainting.elipse=1"],
        "command line:1: objective.inpainting.elipse: unknown key - did you mean 'objective.inpainting.ellipse'?",
    ),
    "an adapter that is none": (
        SD + "adaptation: {kind: dora}", [], "FILE:4: adaptation.kind: got 'dora', wanted one of full, lora - did you mean 'lora'?"
    ),
    "a rank of all weights": (
        SD + "adaptation: {kind: full, rank: 4}", [], "FILE:4: adaptation.rank: unknown key; it belongs to adaptation.kind=lora"
    ),
    "no rank": (SD + "adaptation: {kind: lora, rank: 0}", [], "FILE:4: adaptation.rank: got 0, wanted at least 1; the default is 4"),
    "all dropped": (
        SD, ["objective.caption_dropout=1.0"],
        "command line:1: objective.caption_dropout: got 1.0, wanted less than 1; the default is 0.0",
    ),
    "one prompt that is no list": (
        SD, ["validation.prompts=a couple"], "command line:1: validation.prompts: got 'a couple', wanted a list; the default is []"
    ),
    "groups of an autoencoder": (
        "model: {kind: autoencoder, channels: [32, 60]}", [],
        "FILE:3: model.norm_groups: 8 groups do not divide the width 60; give widths that are multiples of model.norm_groups",
    ),
    "no autoencoder": (
        "model: {kind: latent_base}", [],
        "FILE:3: model.autoencoder: missing; add it: Folder or Hub id of the AutoencoderKL: a run's export, or a pipeline with vae/",
    ),
    "flags of a small base": (
        "model: {kind: latent_base, autoencoder: vae, channels: [64, 128]}", [],
        "FILE:3: model.attention: 3 flags for 2 levels; give one flag per width of model.channels=[64, 128]",
    ),
    "heads of a small base": (
        "model: {kind: latent_base, autoencoder: vae, channels: [64, 96, 144], norm_groups: 16}", [],
        "FILE:3: model.head_width: heads of 32 channels do not divide the width 144; set a divisor",
    ),
    "groups of a small base": (
        "model: {kind: latent_base, autoencoder: vae, channels: [48, 64, 128]}", [],
        "FILE:3: model.norm_groups: 32 groups do not divide the width 48; give widths that are multiples of model.norm_groups",
    ),
    "text of a small base": (
        "model: {kind: latent_base, autoencoder: vae, text_width: 100}", [],
        "FILE:3: model.text_width: 100 is not a multiple of 32; set model.text_width=128",
    ),
    "stored text of a trained encoder": (
        "model: {kind: stable_diffusion, train_text_encoder: true, text: stored}", [],
        "FILE:3: model.text: stored states are of the frozen text encoder; set model.text=encode",
    ),
    "a token that no prompt has": (
        SD + "dreambooth: {new_token: <cmg>, instance_prompt: a cartoon}", [],
        "FILE:4: dreambooth.new_token: '<cmg>' is not in instance_prompt 'a cartoon', so it would learn nothing; put it into the prompt",
    ),
    "a start of no token": (
        SD + "dreambooth: {token_from: cartoon}", [],
        "FILE:4: dreambooth.token_from: there is no new token to start; set dreambooth.new_token",
    ),
    "a weight of no class images": (
        SD + "dreambooth: {instance_prompt: a cartoon, prior_weight: 0.5}", [],
        "FILE:4: dreambooth.prior_weight: without a prompt of class images there is no prior preservation, so it has no effect; "
        "set dreambooth.class_prompt, or leave dreambooth.prior_weight out",
    ),
    "class images of no prompt": (
        SD + "dreambooth: {instance_prompt: a cartoon}", ["dreambooth.class_guidance=2.0", "dreambooth.class_steps=12"],
        "command line:2: dreambooth.class_steps: without a prompt of class images there is no prior preservation, so it has no effect; "
        "set dreambooth.class_prompt, or leave dreambooth.class_steps out",
    ),
    "fewer class images than a step takes": (
        CLASSES, ["data.global_batch_size=8", "data.micro_batch_size=2"],
        "FILE:4: dreambooth.class_images: 4 images are fewer than data.global_batch_size=8; set dreambooth.class_images=8 at least",
    ),
    "class images beside stored latents": (
        CLASSES, ["data.global_batch_size=4", "data.micro_batch_size=2", "model.latents=stored"],
        "command line:3: model.latents: class images are encoded in every step; set model.latents=encode",
    ),
    "class images beside stored masks": (
        CLASSES, ["data.global_batch_size=4", "data.micro_batch_size=2", "objective.inpainting.source=stored"],
        "command line:3: objective.inpainting.source: class images have no masks of their own; set objective.inpainting.source=drawn",
    ),
    "class images beside other shapes": (
        CLASSES, ["data.global_batch_size=4", "data.micro_batch_size=2", "data.image_size=64", "data.aspect_buckets={}"],
        "command line:4: data.aspect_buckets: class images are squares, and go through the network together with the training images; "
        "set data.aspect_buckets=null",
    ),
    "no shape of masks": (
        SD, ["objective.inpainting={rectangle: 0, ellipse: 0}"],
        "command line:1: objective.inpainting.rectangle: all shares are 0, so that no mask can be drawn; "
        "set objective.inpainting.rectangle=1",
    ),
    "eps of noise alone": (
        SD, ["objective.zero_terminal_snr=true", "objective.prediction=eps"],
        "command line:1: objective.zero_terminal_snr: eps says nothing about the image where there is noise alone; "
        "set objective.prediction=v, or zero_terminal_snr=false",
    ),
    "prompts of the base": (
        SD + "validation: {prompts: [a, b], base_prompts: [c]}", [],
        "FILE:4: validation.base_prompts: 1 for 2 prompts; give one for each, or none",
    ),
    "another model's objective": (
        SD + "objective: {kind: denoising}", [],
        "FILE:4: objective.kind: denoising does not go with model.kind=stable_diffusion; set objective.kind=latent_denoising",
    ),
    "an autoencoder's objective": (
        "model: {kind: autoencoder}", ["objective.kind=latent_denoising"],
        "command line:1: objective.kind: latent_denoising does not go with model.kind=autoencoder; set objective.kind=autoencoding",
    ),
    "noise of one's own": (
        SD + "noise_schedule: {kind: cosine}", [],
        "FILE:4: noise_schedule.kind: the noise levels of a base are its own, not cosine; set noise_schedule.kind=base",
    ),
    "noise of no base": (
        "model: {kind: latent_base, autoencoder: vae}\nnoise_schedule: {kind: base}", [],
        "FILE:4: noise_schedule.kind: latent_base has no base; set noise_schedule.kind=scaled_linear",
    ),
    "an adapter of no base": (
        "adaptation: {kind: lora}", [], "FILE:3: adaptation.kind: tiny_unet has no base to adapt; set adaptation.kind=full"
    ),
    "DreamBooth of pixels": (
        "dreambooth: {instance_prompt: a}", [],
        "FILE:3: dreambooth: DreamBooth here is of Stable Diffusion; set dreambooth=null",
    ),
    "halvings of latents": (
        SD + "distill: {updates: 5}", [],
        "FILE:4: distill: halvings are of pixel models, not of stable_diffusion; leave the distill section out",
    ),
    "masks of a prior": (
        "model: {kind: wuerstchen_prior}", ["objective.inpainting={}"],
        "command line:1: objective.inpainting: wuerstchen_prior cannot fill masks; set model.kind=stable_diffusion",
    ),
    "v of Wuerstchen": (
        "model: {kind: wuerstchen_prior}", ["objective.prediction=v"],
        "command line:1: objective.prediction: Wuerstchen's prior predicts eps; set objective.prediction=base",
    ),
    "another prediction of Kandinsky": (
        "model: {kind: kandinsky22_prior}", ["objective.prediction=eps"],
        "command line:1: objective.prediction: Kandinsky's pipelines draw with the levels and the prediction of their own sampler alone; "
        "set objective.prediction=base and objective.zero_terminal_snr=false",
    ),
    "the last level of continuous noise": (
        "model: {kind: wuerstchen_prior}", ["objective.zero_terminal_snr=true"],
        "command line:1: objective.zero_terminal_snr: Wuerstchen's noise is continuous; set objective.zero_terminal_snr=false",
    ),
    "offset noise of embeddings": (
        "model: {kind: kandinsky22_prior}", ["objective.offset_noise=0.1"],
        "command line:1: objective.offset_noise: an embedding has no height and width to shift as a whole, so that it would only be more "
        "noise; set objective.offset_noise=0",
    ),
    "captions of an image decoder": (
        "model: {kind: kandinsky22_decoder}", ["objective.caption_dropout=0.1"],
        "command line:1: objective.caption_dropout: Kandinsky's decoder is told an image, no caption; set objective.caption_dropout=0",
    ),
    "a layout of embeddings": (
        "model: {kind: kandinsky22_prior}", ["train.memory_format=channels_last"],
        "command line:1: train.memory_format: a prior's latents have no height and width; set train.memory_format=contiguous",
    ),
    "stored latents mirrored": (
        SD, ["model.latents=stored", "data.horizontal_flip=true"],
        "command line:2: data.horizontal_flip: stored latents cannot be mirrored; set data.horizontal_flip=false or model.latents=encode",
    ),
    "stored latents scaled": (
        SD, ["model.latents=stored", "data.image_size=64"],
        "command line:2: data.image_size: stored latents keep their size, so 64 has no effect; "
        "set data.image_size=null or model.latents=encode",
    ),
    "stored latents masked": (
        SD, ["model.latents=stored", "objective.inpainting={}"],
        "command line:1: model.latents: the masked image has to be encoded in every step; set model.latents=encode",
    ),
    "stored text of prompts": (
        SD, ["model.text=stored", "dreambooth.instance_prompt=a"],
        "command line:1: model.text: DreamBooth's prompts are encoded in every step; set model.text=encode",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("text", "overrides", "line"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line_with_its_place_and_what_to_write(text: str, overrides: list[str], line: str, tmp_path: Path) -> None:
    assert mistakes_of(tmp_path, text + "\n", *overrides) == [line]
