"""Inpainting U-Nets: nine input channels, of which a text-to-image base knows the first four."""

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

LATENT_CHANNELS, MASK_CHANNELS = 4, 1
INPAINTING_CHANNELS = 2 * LATENT_CHANNELS + MASK_CHANNELS


def widen(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """The same U-Net with nine input channels; those of a four-channel base get weights of 0 for the new ones, in place.

    So its output is the base's until it has learnt to use them; a nine-channel one is left as it is. Wants whole weights: before a
    sharding engine takes the model. Raises: ValueError for another number of channels."""
    old = unet.conv_in
    if unet.config["in_channels"] == INPAINTING_CHANNELS:
        return unet
    if unet.config["in_channels"] != LATENT_CHANNELS:
        raise ValueError(
            f"the U-Net has in_channels={unet.config['in_channels']}, wanted {LATENT_CHANNELS} (text to image, to be widened) or "
            f"{INPAINTING_CHANNELS} (inpainting); give another base in model.base"
        )
    # On the meta device, so that no random numbers are drawn for weights that are not kept.
    new = nn.Conv2d(INPAINTING_CHANNELS, old.out_channels, old.kernel_size, padding=old.padding, device="meta")  # pyright: ignore[reportArgumentType]
    weight = torch.zeros(new.weight.shape, dtype=old.weight.dtype, device=old.weight.device)
    weight[:, :LATENT_CHANNELS] = old.weight.detach()
    new.weight, new.bias = nn.Parameter(weight, requires_grad=old.weight.requires_grad), old.bias
    unet.conv_in = new
    unet.register_to_config(in_channels=INPAINTING_CHANNELS)
    return unet


def inpainting_input(
    x_t: Float[Tensor, "b 4 h w"], mask_latent: Float[Tensor, "b 1 h w"], masked_latents: Float[Tensor, "b 4 h w"]
) -> Float[Tensor, "b 9 h w"]:
    """What an inpainting U-Net takes, in the order of stock pipelines.

    x_t: noisy latents; mask_latent: 1 where they are painted; masked_latents: of the image without what is to be painted.
    Source: Rombach et al. 2022, arXiv:2112.10752, section 4.5, with the mask before the masked image as in its inpainting weights."""
    return torch.cat([x_t, mask_latent, masked_latents], dim=1)


def masked_pixels(images: Float[Tensor, "b c h w"], mask: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b c h w"]:
    """Images in [-1, 1] with 0, a middle grey, where they are to be painted: where the mask is 0.5 or more."""
    return images * (mask < 0.5)
