"""x_0 and cond of priors' micro-batches as trainer.latents.inputs puts them together, for tests of the models alone."""

import torch
from torch import Tensor

from data_shards.encoders.image import ImageEncoder
from data_shards.encoders.text import TextEncoder
from data_shards.encoders.vae import LatentEncoder
from data_shards.reading.sample import MicroBatch
from trainer.models.frozen_inputs import image_states, latents, text_states
from trainer.models.kandinsky import ImageStatistics
from trainer.models.wuerstchen import to_prior_latents

Encoded = tuple[Tensor, dict[str, Tensor]]


def encode_wuerstchen_prior(
    batch: MicroBatch, *, image_encoder: ImageEncoder | None, text_encoder: TextEncoder | None, device: torch.device
) -> Encoded:
    """Of Wuerstchen's prior."""
    cond = text_states(batch, text_encoder, ("text",), device=device)
    return to_prior_latents(image_states(batch, image_encoder, device=device)), cond


def encode_kandinsky_prior(
    batch: MicroBatch,
    *,
    statistics: ImageStatistics,
    image_encoder: ImageEncoder | None,
    text_encoder: TextEncoder | None,
    device: torch.device,
) -> Encoded:
    """Of Kandinsky's prior."""
    cond = text_states(batch, text_encoder, ("text", "pooled", "text_mask"), device=device)
    return statistics.standardise(image_states(batch, image_encoder, device=device)), cond


def encode_kandinsky_decoder(
    batch: MicroBatch, *, image_encoder: ImageEncoder | None, movq: LatentEncoder | None, device: torch.device
) -> Encoded:
    """Of Kandinsky's decoder."""
    return latents(batch, movq, device=device), {"image": image_states(batch, image_encoder, device=device)}
