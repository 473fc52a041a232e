"""How each kind is shrunk: what differs from the true architecture, in its own words; all else stays."""

from collections.abc import Mapping

from trainer.architectures import Architecture, Component, read_architecture

IMAGE_SIDE = 64
"""Images of this many pixels are 8x8 latents, which four levels of a U-Net halve down to 1x1."""
WIDTH = 32
"""Of the text states that a U-Net looks at."""
CLIP_SIDE = 32

Changes = Mapping[str, Mapping[str, object]]

_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": WIDTH,
}
_VAE = {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": IMAGE_SIDE}
_PROCESSOR = {"size": {"shortest_edge": CLIP_SIDE}, "crop_size": {"height": CLIP_SIDE, "width": CLIP_SIDE}}
_UNET = {
    "sample_size": IMAGE_SIDE // 8,
    "block_out_channels": [16, 32, 32, 32],
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,  # the number of heads, by an old misnaming
}
_STABLE_DIFFUSION: Changes = {"unet": _UNET, "vae": _VAE, "text_encoder": _TEXT, "feature_extractor": _PROCESSOR}

_SHAPES: Mapping[str, tuple[str, Changes]] = {
    "stable_diffusion": ("stable_diffusion_1_5", _STABLE_DIFFUSION),
    "stable_diffusion_inpainting": ("stable_diffusion_1_5_inpainting", _STABLE_DIFFUSION),
}


def tiny_architecture(name: str) -> Architecture:
    """The shrunk pipeline of that name, its vocabulary still CLIP's."""
    base, changes = _SHAPES[name]
    true = read_architecture(base)
    assert changes.keys() <= true.components.keys(), f"{name} changes components that {base} does not have"
    components: dict[str, Component] = {part: entry.with_config(changes.get(part, {})) for part, entry in true.components.items()}
    return Architecture(f"tiny {name}", true.pipeline, f"tiny, random, in the shape of {true.source}", true.settings, {}, components)
