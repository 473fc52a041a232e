"""Stable Diffusion's U-Net, with its text encoder where that is trained too, as a trainable model."""

from collections.abc import Mapping
from typing import final

from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CLIPTextModel

from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.inpainting import inpainting_input


def is_xl(unet_config: Mapping[str, object]) -> bool:
    """Whether a U-Net of this config is told pooled text and sizes, as Stable Diffusion XL's is."""
    return unet_config.get("addition_embed_type") == "text_time"


@final
class StableDiffusionDenoiser(nn.Module):
    """The U-Net with the arguments that all latent models take, and the text encoder that is trained with it, if any."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel | None = None) -> None:
        super().__init__()
        self.unet = unet
        self.text_encoder = text_encoder

    def forward(self, x_t: Float[Tensor, "b 4 h w"], timestep: Float[Tensor, " b"], cond: Mapping[str, Tensor]) -> UNet2DOutput:
        """What the base predicts. cond: text, the text encoder's states, or input_ids, the captions' tokens where it is trained.

        For inpainting also mask [b 1 h w] and masked_latents [b 4 h w]; for XL pooled and time_ids."""
        hidden = cond["text"] if self.text_encoder is None else self.text_encoder(cond["input_ids"].long()).last_hidden_state
        sample = inpainting_input(x_t, cond["mask"], cond["masked_latents"]) if "mask" in cond else x_t
        added = {"text_embeds": cond["pooled"], "time_ids": cond["time_ids"]} if "time_ids" in cond else None
        output = self.unet(sample, timestep, encoder_hidden_states=hidden, added_cond_kwargs=added, return_dict=False)
        return UNet2DOutput(sample=output[0])

    def units(self) -> tuple[nn.Module, ...]:
        """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more."""
        assert self.unet.mid_block is not None, "a U-Net has a middle block unless its configuration takes it away"
        text = () if self.text_encoder is None else tuple(self.text_encoder.encoder.layers)
        return (*text, *self.unet.down_blocks, self.unet.mid_block, *self.unet.up_blocks)

    def checkpoint_activations(self) -> None:
        """Compute the activations inside the blocks again in the backward pass."""
        enable_activation_checkpointing(self.unet)
        if self.text_encoder is not None:
            self.text_encoder.gradient_checkpointing_enable({"use_reentrant": False})
