"""A trained network put into the stock pipeline of its family, its other parts taken from the base."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast, final

import torch
from diffusers import AutoencoderKL, VQModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_inpaint import StableDiffusionInpaintPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import nn
from transformers import CLIPImageProcessorPil, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, PreTrainedTokenizerBase

from data_shards.encoders.files import ModelFiles
from trainer.architectures import Component
from trainer.config import (
    Kandinsky22DecoderConfig,
    Kandinsky22PriorConfig,
    LatentBaseConfig,
    RunConfig,
    ScaledLinearNoiseSchedule,
    StableDiffusionConfig,
    WuerstchenPriorConfig,
)
from trainer.diffusion.schedule import build_alpha_bar
from trainer.latents.base import find_part, scheduler_config
from trainer.latents.networks import load_text_encoder
from trainer.latents.trained import latent_config, latent_objective, load_tokenizer
from trainer.latents.xl import assemble_xl
from trainer.models.deprecated import KandinskyV22Pipeline, KandinskyV22PriorPipeline, WuerstchenPriorPipeline
from trainer.models.from_config import build_scheduler
from trainer.models.stable_diffusion import is_xl

_PREDICTIONS = {"v": "v_prediction", "eps": "epsilon", "x_0": "sample"}


@final
@dataclass(frozen=True, eq=False)
class Parts:
    """What a pipeline has beside its trained network; None is loaded from the base."""

    text_encoder: object | None = None
    text_encoder_2: object | None = None
    """Of XL, together with the first."""
    tokenizer: PreTrainedTokenizerBase | None = None
    vae: nn.Module | None = None
    image_encoder: nn.Module | None = None


def assemble(config: RunConfig, network: object, parts: Parts, *, device: torch.device) -> DiffusionPipeline:
    """The stock pipeline of a latent model's family around `network`, its U-Net or prior, with the trained noise schedule.

    network: a diffusers model, or what stands in for one. Nothing is unpickled. Raises: ValueError if the base lacks a part."""
    match latent_config(config):
        case LatentBaseConfig() as model:
            vae = parts.vae or _vae(find_part(model.autoencoder, "vae", revision=None), device)
            return _stable_diffusion(StableDiffusionPipeline, network, parts, vae=vae, scheduler=trained_scheduler(config, None))
        case StableDiffusionConfig() as model:
            kind = StableDiffusionPipeline if latent_objective(config).inpainting is None else StableDiffusionInpaintPipeline
            text = find_part(model.base, "text_encoder", revision=model.revision)
            vae = parts.vae or _vae(find_part(model.base, "vae", revision=model.revision), device)
            if is_xl(getattr(network, "config", {})):
                both = None if parts.text_encoder is None else (parts.text_encoder, parts.text_encoder_2)
                scheduler = trained_scheduler(config, text)
                return assemble_xl(model, network, vae=vae, text_encoders=both, scheduler=scheduler, device=device)
            known = Parts(
                text_encoder=parts.text_encoder or load_text_encoder(text.folder).to(device),  # pyright: ignore[reportArgumentType]
                tokenizer=parts.tokenizer or load_tokenizer(text.beside("tokenizer")),
            )
            return _stable_diffusion(kind, network, known, vae=vae, scheduler=trained_scheduler(config, text))
        case WuerstchenPriorConfig() as model:
            text = find_part(model.base, "text_encoder", revision=model.revision)
            return WuerstchenPriorPipeline(
                tokenizer=load_tokenizer(text.beside("tokenizer")),  # pyright: ignore[reportArgumentType]
                text_encoder=parts.text_encoder or load_text_encoder(text.folder).to(device),  # pyright: ignore[reportArgumentType]
                prior=network,  # pyright: ignore[reportArgumentType]
                scheduler=trained_scheduler(config, text),  # pyright: ignore[reportArgumentType]
            )
        case Kandinsky22PriorConfig() as model:
            text = find_part(model.base, "text_encoder", revision=model.revision)
            image = find_part(model.base, "image_encoder", revision=model.revision)
            return KandinskyV22PriorPipeline(
                prior=network,  # pyright: ignore[reportArgumentType]
                image_encoder=parts.image_encoder or _load(CLIPVisionModelWithProjection, image, device),  # pyright: ignore[reportArgumentType]
                text_encoder=parts.text_encoder or _load(CLIPTextModelWithProjection, text, device),  # pyright: ignore[reportArgumentType]
                tokenizer=load_tokenizer(text.beside("tokenizer")),  # pyright: ignore[reportArgumentType]
                scheduler=trained_scheduler(config, text),  # pyright: ignore[reportArgumentType]
                image_processor=CLIPImageProcessorPil.from_pretrained(  # pyright: ignore[reportArgumentType]
                    image.beside("image_processor", "feature_extractor"), local_files_only=True
                ),
            )
        case Kandinsky22DecoderConfig() as model:
            movq = find_part(model.base, "movq", revision=model.revision)
            return KandinskyV22Pipeline(
                unet=network,  # pyright: ignore[reportArgumentType]
                scheduler=trained_scheduler(config, movq),  # pyright: ignore[reportArgumentType]
                movq=parts.vae or VQModel.from_pretrained(movq.folder, local_files_only=True, use_safetensors=True).to(device),  # pyright: ignore
            )


def trained_scheduler(config: RunConfig, files: ModelFiles | None) -> SchedulerMixin:
    """The sampler that a model's pipeline has: the base's own, on the levels and with the prediction that were trained.

    files: of a part of the base; None for a model from scratch.
    Raises: ValueError for a class of scheduler that is not known here."""
    objective = latent_objective(config)
    if files is None:
        values: dict[str, object] = {"_class_name": "DDIMScheduler", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
        values |= _levels(config)
        values["prediction_type"] = _PREDICTIONS["v" if objective.prediction == "base" else objective.prediction]
    else:
        values = scheduler_config(files)
        if objective.prediction != "base":
            values["prediction_type"] = _PREDICTIONS[objective.prediction]
    if objective.zero_terminal_snr or objective.halving is not None:
        # PNDM and others know no level without signal; DDIM begins there. A student's steps are DDIM's, and end with a clean latent.
        kept = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "set_alpha_to_one")
        values = {name: value for name, value in values.items() if name in kept}
        values |= {"_class_name": "DDIMScheduler", "clip_sample": False, "timestep_spacing": "trailing"}
        values |= {"rescale_betas_zero_snr": True} if objective.zero_terminal_snr else {}
        values |= {"set_alpha_to_one": True} if objective.halving is not None else {}
        values["steps_offset"] = 1  # trailing steps make no use of it, pipelines insist on it
    name = values.get("_class_name")
    settings = {key: value for key, value in values.items() if not key.startswith("_")}
    return build_scheduler(Component("diffusers", str(name), settings))


def _levels(config: RunConfig) -> Mapping[str, object]:
    """The levels of a model from scratch, as a scheduler's config says them."""
    schedule = config.noise_schedule
    if isinstance(schedule, ScaledLinearNoiseSchedule):
        ends = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end}
        return {"num_train_timesteps": schedule.steps, "beta_schedule": "scaled_linear", **ends}
    alpha_bar = build_alpha_bar(schedule).tolist()
    betas = [1 - now / before for before, now in zip([1.0, *alpha_bar], alpha_bar, strict=False)]
    return {"num_train_timesteps": len(betas), "trained_betas": betas}


def _stable_diffusion(
    kind: type[StableDiffusionPipeline] | type[StableDiffusionInpaintPipeline],
    network: object,
    parts: Parts,
    *,
    vae: nn.Module,
    scheduler: SchedulerMixin,
) -> DiffusionPipeline:
    return kind(
        vae=cast("AutoencoderKL", vae),
        text_encoder=parts.text_encoder,  # pyright: ignore[reportArgumentType]
        tokenizer=parts.tokenizer,  # pyright: ignore[reportArgumentType]
        unet=network,  # pyright: ignore[reportArgumentType]
        scheduler=scheduler,  # pyright: ignore[reportArgumentType]
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def _vae(files: ModelFiles, device: torch.device) -> nn.Module:
    vae = AutoencoderKL.from_pretrained(files.folder, local_files_only=True, use_safetensors=True, torch_dtype=torch.float32)
    return vae.to(device)  # pyright: ignore[reportArgumentType] (diffusers hides torch's signature)


def _load(
    kind: type[CLIPTextModelWithProjection] | type[CLIPVisionModelWithProjection], files: ModelFiles, device: torch.device
) -> nn.Module:
    model = kind.from_pretrained(files.folder, local_files_only=True, use_safetensors=True, trust_remote_code=False, dtype=torch.float32)
    return model.to(device)  # pyright: ignore[reportArgumentType] (transformers hides torch's signature)
