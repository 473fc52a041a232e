"""Wuerstchen's prior, which draws the latents of its semantic compressor from text, as a trainable model."""

from collections.abc import Mapping
from typing import final

from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float
from torch import Tensor, nn

from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.deprecated import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior

# of WuerstchenPriorPipeline: latents * latent_mean - latent_std gives the compressor's numbers back
LATENT_MEAN, LATENT_STD = 42.0, 1.0
# where peft puts adapters; the last two are in the list of diffusers' own script, and no layer here is called so
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj")
# what encoders must have noted in shards whose tensors stand in for them: padding is not hidden from the prior, so its states matter
STORED: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "image.npy": {"class": ("EfficientNetEncoder",)},
    "text.npy": {"content": ("last_hidden_state, padding masked",)},
}


@final
class WuerstchenPriorDenoiser(nn.Module):
    """The prior with the arguments that all latent models take."""

    def __init__(self, prior: WuerstchenPrior) -> None:
        super().__init__()
        self.prior = prior

    def forward(self, x_t: Float[Tensor, "b c h w"], timestep: Float[Tensor, " b"], cond: Mapping[str, Tensor]) -> UNet2DOutput:
        """eps. timestep: t in [0, 1]; cond: text, the text encoder's last hidden states, padding too: there is no mask here."""
        return UNet2DOutput(sample=self.prior(x_t, timestep, cond["text"]))

    def units(self) -> tuple[nn.Module, ...]:
        """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more.

        Every third block only maps the time and is small: it stays with the rest."""
        return tuple(block for number, block in enumerate(self.prior.blocks) if number % 3 != 1)

    def checkpoint_activations(self) -> None:
        """Compute the activations of each block again in the backward pass."""
        enable_activation_checkpointing(self.prior)


def to_prior_latents(effnet: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The compressor's latents on the scale that the prior learns.

    Source: Pernias et al. 2023, arXiv:2306.00637, as in its authors' code."""
    return (effnet + LATENT_STD) / LATENT_MEAN


def from_prior_latents(x_0: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """The compressor's latents, which the decoder is told: the inverse of `to_prior_latents`."""
    return x_0 * LATENT_MEAN - LATENT_STD


def loadable_index(index: Mapping[str, object]) -> dict[str, object]:
    """The model_index.json of a Wuerstchen pipeline with names by which diffusers 0.42 finds its classes.

    Its save_pretrained writes `diffusers`, where they no longer are, and the Hub's folders say `wuerstchen`, which is gone: its own
    from_pretrained refuses both."""
    classes = {made.__name__: made for made in (WuerstchenPrior, WuerstchenDiffNeXt, PaellaVQModel)}
    mended = dict(index)
    for part, entry in index.items():
        match entry:
            case [_, str(name)] if name in classes:
                mended[part] = [classes[name].__module__, name]
            case _:
                pass
    return mended
