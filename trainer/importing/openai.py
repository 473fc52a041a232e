"""openai's guided-diffusion and improved-diffusion: one U-Net of numbered blocks, which the first gave more options.

Source: github.com/openai/guided-diffusion unet.py, arXiv:2105.05233; github.com/openai/improved-diffusion unet.py, arXiv:2102.09672."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from trainer.importing.settings import BASE_STEPS, Family, Given, Settings, head_width, heads_at, image_size_of, settle
from trainer.importing.unet import NORM_GROUPS, ImportedModel, Piece, Tensors, build_unet, count_of, size_of, widths_of

_IMAGE_CHANNELS = (1, 3)
_RES_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_ATTENTION = {"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out.0": "proj_out"}
_THIRDS = {"to_q": 0, "to_k": 1, "to_v": 2}
_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}


@final
@dataclass(frozen=True)
class _Layout:
    """What names and shapes say. down, up: whether a level attends, finest first. resample_blocks: a ResBlock halves and doubles.

    channels: of an image; learned_variance: the head has as many again."""

    layers: int
    widths: tuple[int, ...]
    down: tuple[bool, ...]
    up: tuple[bool, ...]
    resample_blocks: bool
    scale_shift: bool
    classes: int | None
    channels: int
    learned_variance: bool


def read_openai(tensors: Tensors, given: Given, *, family: Family) -> ImportedModel:
    """The model that a state dict holds, conditioned on times as `pipeline.build_scheduler` counts them.

    Raises: ValueError naming what is missing, left over or of another shape than the rest makes it, or what UNet2DModel does not have."""
    layout = _layout(tensors)
    if family == "improved-diffusion" and layout.resample_blocks:
        raise ValueError("its ResBlocks change the resolution, which only guided-diffusion's do; give --as guided-diffusion")
    image_size = image_size_of(family, given, layout.widths)
    settings, assumed = settle(family, given, image_size=image_size, learned_variance=layout.learned_variance)
    learned_variance = layout.learned_variance and not settings.eps_only
    attended = {width for width, *attends in zip(layout.widths, layout.down, layout.up, strict=True) if any(attends)}
    config = {
        "sample_size": image_size,
        "in_channels": layout.channels,
        "out_channels": layout.channels * (2 if layout.learned_variance else 1),
        "layers_per_block": layout.layers,
        "block_out_channels": layout.widths,
        "down_block_types": tuple(_block("Down", attends, resample_blocks=layout.resample_blocks) for attends in layout.down),
        "up_block_types": tuple(_block("Up", attends, resample_blocks=layout.resample_blocks) for attends in reversed(layout.up)),
        "downsample_type": "resnet" if layout.resample_blocks else "conv",
        "upsample_type": "resnet" if layout.resample_blocks else "conv",
        "resnet_time_scale_shift": "scale_shift" if layout.scale_shift else "default",
        "attention_head_dim": head_width(settings, tuple(sorted({*attended, layout.widths[-1]}))),
        "norm_num_groups": NORM_GROUPS,
        "attn_norm_num_groups": NORM_GROUPS,
        "norm_eps": 1e-5,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "num_class_embeds": layout.classes,
    }
    unet = build_unet(
        tensors,
        config,
        piece_of=lambda target: _piece(target, layout),
        third_of=lambda joint, third: _third(joint, third, settings),
    )
    if layout.learned_variance and not learned_variance:
        unet = _without_variance(unet, config | {"out_channels": layout.channels})
    if settings.rescale_timesteps and settings.diffusion_steps != BASE_STEPS:
        _shift_time(unet, 1 - BASE_STEPS / settings.diffusion_steps)
    return ImportedModel(unet, settings, assumed, image_size, learned_variance, layout.classes)


def _layout(tensors: Tensors) -> _Layout:
    blocks = count_of(tensors, "output_blocks.")
    if not blocks:
        raise ValueError("it lacks output_blocks: half a U-Net, such as a classifier's, which predicts no noise")
    # The last block of each level but the finest doubles the resolution.
    doubling = [int(match[1]) for name in tensors if (match := re.match(r"output_blocks\.(\d{1,3})\.[12]\.(conv|in_layers)\.", name))]
    layers = min(doubling, default=blocks - 1)
    levels, rest = divmod(blocks, layers + 1)
    if rest or not layers:
        raise ValueError(f"its {blocks} output_blocks, of which number {layers} is the first to double, are no levels of equal length")
    first = [1 + level * (layers + 1) for level in range(levels)]
    widths = widths_of(tensors, [f"input_blocks.{at}.0.in_layers.2.weight" for at in first])
    channels, outputs = size_of(tensors, "input_blocks.0.0.weight", 1), size_of(tensors, "out.2.weight")
    if channels not in _IMAGE_CHANNELS or outputs not in (channels, 2 * channels):
        raise ValueError(
            f"it takes {channels} channels and gives {outputs}, wanted images of 1 or 3 and as many or twice as many; "
            "models that enlarge a small image are not read"
        )
    return _Layout(
        layers=layers,
        widths=widths,
        down=tuple(f"input_blocks.{at}.1.qkv.weight" in tensors for at in first),
        up=tuple(f"output_blocks.{(levels - 1 - level) * (layers + 1)}.1.qkv.weight" in tensors for level in range(levels)),
        resample_blocks=f"input_blocks.{layers + 1}.0.in_layers.2.weight" in tensors,
        scale_shift=size_of(tensors, "middle_block.0.emb_layers.1.weight") == 2 * widths[-1],
        classes=size_of(tensors, "label_emb.weight") if "label_emb.weight" in tensors else None,
        channels=channels,
        learned_variance=outputs == 2 * channels,
    )


def _block(direction: str, attends: bool, *, resample_blocks: bool) -> str:
    if attends:
        return f"Attn{direction}Block2D"
    return f"Resnet{direction}sampleBlock2D" if resample_blocks else f"{direction}Block2D"


def _piece(target: str, layout: _Layout) -> Piece:
    """Where a tensor of UNet2DModel lies: the numbered blocks are its resnets and resamplers in the order in which they are run."""
    module, _, kind = target.rpartition(".")
    if module in _ENDS:
        return Piece(f"{_ENDS[module]}.{kind}")
    if match := re.match(r"(mid_block\.\w+\.\d)\.(.+)", module):
        return _part(_ENDS[match[1]], match[2], kind)
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", module)
    assert match is not None, f"UNet2DModel has no tensor {target}"
    side, level, group, index, part = match[1], int(match[2]), match[3], int(match[4]), match[5]
    length = layout.layers + 1
    if side == "down":
        at = f"input_blocks.{(level + 1) * length if group == 'downsamplers' else 1 + level * length + index}"
        place = 1 if group == "attentions" else 0
    else:
        at = f"output_blocks.{level * length + (layout.layers if group == 'upsamplers' else index)}"
        attends = layout.up[len(layout.widths) - 1 - level]
        place = {"resnets": 0, "attentions": 1, "upsamplers": 2 if attends else 1}[group]
    if part == "conv":
        return Piece(f"{at}.{place}.{'op' if side == 'down' else 'conv'}.{kind}")
    return _part(f"{at}.{place}", part, kind)


def _part(block: str, part: str, kind: str) -> Piece:
    """Of a residual or attention block."""
    name = _RES_BLOCK.get(part) or _ATTENTION[part]
    return Piece(f"{block}.{name}.{kind}", _THIRDS.get(part))


def _third(joint: Tensor, third: int, settings: Settings) -> Tensor:
    """Queries, keys or values of a joint projection, in rows. Raises: ValueError if its rows cannot be so divided."""
    width = len(joint) // 3
    heads = heads_at(settings, width)
    if len(joint) != 3 * width or not heads or width % heads:
        raise ValueError(f"a joint projection of attention has {len(joint)} rows, wanted queries, keys and values of {heads} heads")
    if settings.attention_order == "new":
        return joint.unflatten(0, (3, width))[third]
    return joint.unflatten(0, (heads, 3, width // heads))[:, third].flatten(0, 1)


def _without_variance(unet: UNet2DModel, config: Mapping[str, object]) -> UNet2DModel:
    """The U-Net whose head gives the first channels alone, as many as `config` says."""
    with torch.device("meta"):
        cut = UNet2DModel(**config)  # pyright: ignore[reportArgumentType]
    state = unet.state_dict()
    head = {name: state[name][: cut.conv_out.out_channels].clone() for name in ("conv_out.weight", "conv_out.bias")}
    cut.load_state_dict(state | head, assign=True)
    return cut.requires_grad_(False).eval()


def _shift_time(unet: UNet2DModel, shift: float) -> None:
    """Make the U-Net do at time t what it did at t + shift: each pair of cos and sin that its first layer reads is turned by an angle.

    Source: openai's nn.py, timestep_embedding: cosines, then sines, of t * 10000^(-i / n) for i below n."""
    layer = unet.time_embedding.linear_1
    of_cos, of_sin = layer.weight.double().chunk(2, dim=1)
    count = of_cos.shape[1]
    angles = shift * torch.exp(torch.arange(count, dtype=torch.float64, device=of_cos.device) * (-math.log(10000) / count))
    cos, sin = angles.cos(), angles.sin()
    turned = torch.cat([of_cos * cos + of_sin * sin, of_sin * cos - of_cos * sin], dim=1)
    layer.weight = nn.Parameter(turned.float(), requires_grad=False)  # a new one: the old one may be the checkpoint's own memory
