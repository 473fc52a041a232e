"""pesser's pytorch_diffusion: Ho et al.'s CIFAR-10 and LSUN models in PyTorch, which diffusers' U-Net is modelled on.

Source: github.com/pesser/pytorch_diffusion, model.py and diffusion.py; arXiv:2006.11239."""

import re

from trainer.importing.settings import Given, image_size_of, settle
from trainer.importing.unet import NORM_GROUPS, ImportedModel, Piece, Tensors, build_unet, count_of, size_of, widths_of

_PARTS = (
    (r"^time_embedding\.linear_1\.", "temb.dense.0."),
    (r"^time_embedding\.linear_2\.", "temb.dense.1."),
    (r"^conv_norm_out\.", "norm_out."),
    (r"^mid_block\.resnets\.0\.", "mid.block_1."),
    (r"^mid_block\.resnets\.1\.", "mid.block_2."),
    (r"^mid_block\.attentions\.0\.", "mid.attn_1."),
    (r"^down_blocks\.", "down."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.downsamplers\.0\.", ".downsample."),
    (r"\.upsamplers\.0\.", ".upsample."),
    (r"\.time_emb_proj\.", ".temb_proj."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def read_pesser(tensors: Tensors, given: Given) -> ImportedModel:
    """The model that a state dict holds.

    Raises: ValueError naming what is missing, left over or of another shape than the rest makes it."""
    levels, layers = count_of(tensors, "down."), count_of(tensors, "down.0.block.")
    widths = widths_of(tensors, [f"down.{level}.block.0.conv1.weight" for level in range(max(levels, 1))])
    channels, outputs = size_of(tensors, "conv_in.weight", 1), size_of(tensors, "conv_out.weight")
    if outputs != channels:
        raise ValueError(f"it takes {channels} channels and gives {outputs}, wanted as many: the noise in them")
    image_size = image_size_of("pesser", given, widths)
    settings, assumed = settle("pesser", given, image_size=image_size)
    attends = [f"{side}.{level}.attn.0.q.weight" in tensors for side in ("down", "up") for level in range(levels)]
    config = {
        "sample_size": image_size,
        "in_channels": channels,
        "out_channels": channels,
        "layers_per_block": layers,
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if attended else "DownBlock2D" for attended in attends[:levels]),
        "up_block_types": tuple("AttnUpBlock2D" if attended else "UpBlock2D" for attended in reversed(attends[levels:])),
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "norm_num_groups": NORM_GROUPS,
    }
    unet = build_unet(tensors, config, piece_of=lambda target: Piece(_name(target, levels)))
    return ImportedModel(unet, settings, assumed, image_size)


def _name(target: str, levels: int) -> str:
    """pesser's name of a tensor of UNet2DModel; its list of levels upwards begins with the finest, which is run last."""
    if match := re.match(r"up_blocks\.(\d+)", target):
        target = f"up.{levels - 1 - int(match[1])}{target[match.end() :]}"
    for pattern, replacement in _PARTS:
        target = re.sub(pattern, replacement, target)
    return target
