"""Inputs of the shapes that a latent model takes, for counting what it costs."""

import torch
from torch import Tensor

from trainer.config import RunConfig
from trainer.latents.inputs import Cond
from trainer.latents.trained import Trained, latent_objective
from trainer.models.kandinsky import KandinskyDecoderDenoiser, KandinskyPriorDenoiser
from trainer.models.stable_diffusion import StableDiffusionDenoiser, is_xl
from trainer.models.wuerstchen import WuerstchenPriorDenoiser

CLIP_TOKENS = 77


def example(config: RunConfig, trained: Trained, latent_shape: tuple[int, ...], *, count: int = 1) -> tuple[Tensor, Tensor, Cond]:
    """x_t, timestep and cond of `count` images, all zero, on torch's default device. latent_shape: of one image's x_0."""
    x_t, timestep = torch.zeros(count, *latent_shape), torch.zeros(count)
    match trained.module:
        case StableDiffusionDenoiser() as module:
            width, cond = int(module.unet.config["cross_attention_dim"]), {}
            if module.text_encoder is None:
                cond["text"] = torch.zeros(count, CLIP_TOKENS, width)
                if is_xl(module.unet.config):
                    config_values = module.unet.config
                    pooled = config_values["projection_class_embeddings_input_dim"] - 6 * config_values["addition_time_embed_dim"]
                    cond |= {"pooled": torch.zeros(count, pooled), "time_ids": torch.zeros(count, 6)}
            else:
                tokens = int(module.text_encoder.config.get_text_config().max_position_embeddings)
                cond["input_ids"] = torch.zeros(count, tokens, dtype=torch.int64)
            if latent_objective(config).inpainting is not None:
                cond |= {"mask": torch.zeros(count, 1, *latent_shape[1:]), "masked_latents": torch.zeros_like(x_t)}
        case WuerstchenPriorDenoiser() as module:
            cond = {"text": torch.zeros(count, CLIP_TOKENS, int(module.prior.config["c_cond"]))}
        case KandinskyPriorDenoiser() as module:
            width = int(module.prior.config["embedding_dim"])
            cond = {
                "text": torch.zeros(count, CLIP_TOKENS, width),
                "pooled": torch.zeros(count, width),
                "text_mask": torch.ones(count, CLIP_TOKENS, dtype=torch.int64),
            }
        case KandinskyDecoderDenoiser() as module:
            cond = {"image": torch.zeros(count, int(module.unet.config["encoder_hid_dim"]))}
        case other:
            raise ValueError(f"{type(other).__name__} is no latent denoiser")
    return x_t, timestep, cond
