"""Kandinsky 2.2's prior, which draws CLIP's image embedding from text, and its decoder, which draws images from that."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.deprecated import PriorTransformer

# where peft puts adapters; the last two are the decoder's, whose attention has keys and values of the image embedding
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
_IMAGE: Mapping[str, tuple[str, ...]] = {"class": ("CLIPVisionModelWithProjection",)}
# what encoders must have noted in shards whose tensors stand in for them
STORED_PRIOR: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "image.npy": _IMAGE,
    "text.npy": {
        "class": ("CLIPTextModelWithProjection",),
        "content": ("last_hidden_state, padding masked", "last_hidden_state, padding not masked"),
    },
}
STORED_DECODER: Mapping[str, Mapping[str, tuple[str, ...]]] = {"image.npy": _IMAGE, "latents.npy": {"class": ("VQModel",)}}


@final
@dataclass(frozen=True)
class ImageStatistics:
    """Mean and deviation of CLIP's image embeddings over the data that the prior was first trained on."""

    mean: Float[Tensor, "1 d"]
    std: Float[Tensor, "1 d"]

    def standardise(self, embeds: Float[Tensor, "b d"]) -> Float[Tensor, "b d"]:
        """Embeddings on the scale that the prior learns; PriorTransformer.post_process_latents is the inverse."""
        return (embeds - self.mean.to(embeds)) / self.std.to(embeds)


def image_statistics(prior: PriorTransformer) -> ImageStatistics:
    """Copies of clip_mean and clip_std, to be taken before an engine shards the weights.

    Raises: ValueError if a deviation is not above zero, as in a prior that was never trained."""
    mean, std = prior.clip_mean.detach().clone(), prior.clip_std.detach().clone()
    if not bool((std > 0).all()) or not bool(torch.isfinite(mean).all()):
        raise ValueError(
            "the prior's clip_std holds numbers that are not above zero, so that no image embedding can be scaled; "
            "wanted the weights of a trained prior such as kandinsky-community/kandinsky-2-2-prior"
        )
    return ImageStatistics(mean, std)


@final
class KandinskyPriorDenoiser(nn.Module):
    """The prior with the arguments that all latent models take; its clip_mean and clip_std are constants."""

    def __init__(self, prior: PriorTransformer) -> None:
        super().__init__()
        self.prior = prior
        for constant in (prior.clip_mean, prior.clip_std):
            constant.requires_grad_(False)

    def forward(self, x_t: Float[Tensor, "b d *ones"], timestep: Float[Tensor, " b"], cond: Mapping[str, Tensor]) -> UNet2DOutput:
        """x_0, in the shape of x_t: standardised image embeddings, with or without sides of 1 behind them.

        cond: text, the last hidden states; pooled, the caption's embedding of the same width as x_t; text_mask, 1 where a token is
        no padding. Without a mask diffusers would leave out the causal one, too."""
        embeds = self.prior(
            x_t.flatten(1),
            timestep,
            proj_embedding=cond["pooled"],
            encoder_hidden_states=cond["text"],
            attention_mask=cond["text_mask"],
        ).predicted_image_embedding
        return UNet2DOutput(sample=embeds.reshape(x_t.shape))

    def units(self) -> tuple[nn.Module, ...]:
        """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more."""
        return tuple(self.prior.transformer_blocks)

    def checkpoint_activations(self) -> None:
        """Compute the activations of each block again in the backward pass, which diffusers does not offer for this class.

        Call it once, before an engine wraps the blocks."""
        for block in self.prior.transformer_blocks:
            # of the instance: names of parameters stay as they are, and an engine's hooks run around it once
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


@final
class KandinskyDecoderDenoiser(nn.Module):
    """The decoder's U-Net with the arguments that all latent models take."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Float[Tensor, "b c h w"], timestep: Float[Tensor, " b"], cond: Mapping[str, Tensor]) -> UNet2DOutput:
        """eps, and behind it on the channels a variance that pipelines sample with and no objective trains.

        cond: image, CLIP's image embedding, not standardised; the U-Net is told no text."""
        output = self.unet(x_t, timestep, encoder_hidden_states=None, added_cond_kwargs={"image_embeds": cond["image"]})
        return UNet2DOutput(sample=output.sample)

    def units(self) -> tuple[nn.Module, ...]:
        """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more."""
        assert self.unet.mid_block is not None, "a U-Net has a middle block unless its configuration takes it away"
        return (*self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks)

    def checkpoint_activations(self) -> None:
        """Compute the activations inside the blocks again in the backward pass."""
        enable_activation_checkpointing(self.unet)
