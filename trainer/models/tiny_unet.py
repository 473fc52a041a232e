"""The paper's tiny diffusion: a compact U-Net whose blocks interleave convolution and self-attention, as a stock UNet2DModel."""

from collections.abc import Callable

from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float
from torch import Tensor, nn

from trainer.config import TinyUNetConfig

Denoiser = Callable[[Float[Tensor, "b c h w"], Float[Tensor, " b"]], Float[Tensor, "b c h w"]]


def build_tiny_unet(model: TinyUNetConfig, image_size: int, *, image_channels: int = 3) -> UNet2DModel:
    """A U-Net with one resolution level per entry of `model.channels`, random weights from torch's default generator.

    image_size: pixels a side; each level but the last halves it.
    Raises: ValueError if the size cannot be halved that often.
    Source: Ho et al. 2020, arXiv:2006.11239, appendix B."""
    halvings = len(model.channels) - 1
    if image_size % 2**halvings:
        raise ValueError(
            f"image size {image_size} cannot be halved {halvings} times for model.channels={list(model.channels)}; "
            f"pack shards of a multiple of {2**halvings} pixels or give fewer channels"
        )
    down = tuple("AttnDownBlock2D" if attends else "DownBlock2D" for attends in model.attention)
    up = tuple("AttnUpBlock2D" if attends else "UpBlock2D" for attends in reversed(model.attention))
    return UNet2DModel(
        sample_size=image_size,
        in_channels=image_channels,
        out_channels=image_channels,
        layers_per_block=model.layers_per_block,
        block_out_channels=tuple(model.channels),
        down_block_types=down,
        up_block_types=up,
        attention_head_dim=head_width(model),
        norm_num_groups=model.norm_groups,
        dropout=model.dropout,
        act_fn="silu",
        add_attention=any(model.attention),
    )


def head_width(model: TinyUNetConfig) -> int:
    """Channels a head: the widest attended level's, divided among `attention_heads`; narrower levels have fewer heads."""
    attended = [width for width, attends in zip(model.channels, model.attention, strict=True) if attends]
    return max(attended, default=model.channels[-1]) // model.attention_heads


def shard_units(model: UNet2DModel) -> tuple[nn.Module, ...]:
    """The parts whose weights a sharded engine gathers together, in the order of the forward pass; the rest is one more."""
    assert model.mid_block is not None, "a U-Net has a middle block unless its configuration takes it away"
    return (*model.down_blocks, model.mid_block, *model.up_blocks)
