"""A small AutoencoderKL trained from scratch: the latents that a latent diffusion model of this machine's size stands on."""

from collections.abc import Iterable, Mapping, Sequence
from typing import final

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d import UNet2DOutput
from jaxtyping import Float
from torch import Tensor, nn

from trainer.diffusion.posterior import mean_and_log_variance, sample_posterior


def build_autoencoder(
    *, channels: Sequence[int], layers_per_block: int, latent_channels: int, norm_groups: int, image_size: int
) -> AutoencoderKL:
    """One resolution level per entry of `channels`, random weights from torch's default generator; each level but the last halves.

    image_size: pixels a side. No attention in the middle: what comes back here is local. The scaling factor is 1 until it is measured.
    Raises: ValueError if the size cannot be halved that often, or a width does not divide into the groups.
    Source: Rombach et al. 2022, arXiv:2112.10752, appendix G."""
    halvings = len(channels) - 1
    if image_size % 2**halvings:
        raise ValueError(
            f"image size {image_size} cannot be halved {halvings} times for model.channels={list(channels)}; "
            f"pack shards of a multiple of {2**halvings} pixels or give fewer channels"
        )
    if odd := [width for width in channels if width % norm_groups]:
        raise ValueError(f"model.channels={list(channels)} has {odd}, no multiple of model.norm_groups={norm_groups}; change either")
    return AutoencoderKL(
        block_out_channels=tuple(channels),  # pyright: ignore[reportArgumentType] (diffusers says a tuple of one)
        down_block_types=("DownEncoderBlock2D",) * len(channels),  # pyright: ignore[reportArgumentType]
        up_block_types=("UpDecoderBlock2D",) * len(channels),  # pyright: ignore[reportArgumentType]
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_groups,
        sample_size=image_size,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


@final
class TrainedAutoencoder(nn.Module):
    """The autoencoder as engines train it: images and noise in, reconstructions and moments out."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(
        self, x_t: Float[Tensor, "b c h w"], timestep: Float[Tensor, "b l i j"], cond: Mapping[str, Tensor] | None = None
    ) -> UNet2DOutput:
        """sample: (reconstructions, moments), both fp32.

        The arguments are named as every trained model's: x_t are the images in [-1, 1], timestep is the posterior noise, standard
        normal and of the latents' shape, cond is not used."""
        moments = self.vae.encode(x_t, return_dict=False)[0].parameters.float()
        latents = sample_posterior(moments, timestep)
        reconstruction = self.vae.decode(latents, return_dict=False)[0].float()  # pyright: ignore[reportArgumentType] (a stub says FloatTensor)
        return UNet2DOutput(sample=(reconstruction, moments))  # pyright: ignore[reportArgumentType] (the engines pass it on as it is)

    def units(self) -> tuple[nn.Module, ...]:
        """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more."""
        encoder, decoder = self.vae.encoder, self.vae.decoder
        return (*encoder.down_blocks, encoder.mid_block, decoder.mid_block, *decoder.up_blocks)

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latent of an image of `image_size` pixels a side."""
        cells = image_size // 2 ** (len(self.vae.encoder.down_blocks) - 1)
        return self.vae.encoder.conv_out.out_channels // 2, cells, cells


def latent_scale(moments: Iterable[Float[Tensor, "b two_l h w"]]) -> float:
    """1 / standard deviation of the latents of some images: what a latent is multiplied by before a diffusion model sees it.

    moments: of a few hundred images, in any batches. The variance of what would be sampled: that of the means about their
    common mean, plus the mean of the posterior's own. Written to config.scaling_factor, as Stable Diffusion's 0.18215 was.
    Raises: ValueError if there are no moments or the latents do not vary.
    Source: Rombach et al. 2022, arXiv:2112.10752, appendix G."""
    count, total, squares = 0, 0.0, 0.0
    for batch in moments:
        mean, log_variance = (part.double() for part in mean_and_log_variance(batch))
        count += mean.numel()
        total += float(mean.sum())
        squares += float((mean.square() + log_variance.exp()).sum())
    variance = squares / count - (total / count) ** 2 if count else 0.0
    if not 0 < variance < float("inf"):
        raise ValueError(f"{count} latent elements of variance {variance:g} give no scaling factor; train the autoencoder on images first")
    return variance**-0.5
