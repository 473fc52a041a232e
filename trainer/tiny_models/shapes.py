"""How each kind is shrunk: what differs from the true architecture, in its own words; all else stays."""

from collections.abc import Mapping

from trainer.architectures import Architecture, Component, read_architecture

IMAGE_SIDE = 64
"""Images of this many pixels are 8x8 latents, which four levels of a U-Net halve down to 1x1."""
WIDTH = 32
"""Of text states, and of what an image encoder gives and a prior predicts."""
CLIP_SIDE = 32
"""Image encoders look at images of this many pixels."""

Changes = Mapping[str, Mapping[str, object]]

_TEXT = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": WIDTH,
}
_VISION = {**_TEXT, "image_size": CLIP_SIDE, "patch_size": 8}
_PROCESSOR = {"size": {"shortest_edge": CLIP_SIDE}, "crop_size": {"height": CLIP_SIDE, "width": CLIP_SIDE}}
_VAE = {"block_out_channels": [8, 16, 16, 16], "layers_per_block": 1, "norm_num_groups": 4, "sample_size": IMAGE_SIDE}
_UNET = {"sample_size": IMAGE_SIDE // 8, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": WIDTH}
_FOUR_LEVELS = {**_UNET, "block_out_channels": [16, 32, 32, 32]}
# attention_head_dim is the number of heads, by an old misnaming
_SD1: Changes = {"unet": {**_FOUR_LEVELS, "attention_head_dim": 2}, "vae": _VAE, "text_encoder": _TEXT, "feature_extractor": _PROCESSOR}
_SD2: Changes = {**_SD1, "unet": {**_FOUR_LEVELS, "attention_head_dim": [1, 2, 4, 4]}}
_SDXL: Changes = {
    "unet": {
        **_UNET,
        "block_out_channels": [16, 32, 32],
        "attention_head_dim": [1, 2, 4],
        "transformer_layers_per_block": [1, 1, 2],
        "cross_attention_dim": 2 * WIDTH,  # both text encoders, one beside the other
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,  # three sizes of two numbers each, and the pooled text
    },
    "vae": _VAE,
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
}
_WUERSTCHEN_PRIOR: Changes = {"prior": {"c": WIDTH, "c_cond": WIDTH, "c_r": 16, "depth": 2, "nhead": 2}, "text_encoder": _TEXT}
_WUERSTCHEN_DECODER: Changes = {
    "decoder": {
        "c_r": 16,
        "c_cond": WIDTH,
        "clip_embd": WIDTH,
        "c_hidden": [16, 16, 32, 32],
        "nhead": [-1, 1, 2, 2],
        "blocks": [1, 1, 2, 1],
    },
    "vqgan": {"embed_dim": 32, "bottleneck_blocks": 2, "num_vq_embeddings": 64},
    "text_encoder": _TEXT,
}
_KANDINSKY_PRIOR: Changes = {
    "prior": {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "embedding_dim": WIDTH},
    "text_encoder": _TEXT,
    "image_encoder": _VISION,
    "image_processor": _PROCESSOR,
}
_KANDINSKY_DECODER: Changes = {
    "unet": {**_FOUR_LEVELS, "attention_head_dim": 8, "encoder_hid_dim": WIDTH},
    # its spatial norms have 32 groups whatever the config says
    "movq": {"block_out_channels": [32, 32, 32, 32], "layers_per_block": 1, "num_vq_embeddings": 64, "sample_size": IMAGE_SIDE},
    "image_encoder": _VISION,
    "image_processor": _PROCESSOR,
}
_DDPM: Changes = {
    "unet": {
        "sample_size": 32,
        "layers_per_block": 1,
        "block_out_channels": [16, 32, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        "norm_num_groups": 8,
    }
}

_SHAPES: Mapping[str, tuple[str, Changes]] = {
    "stable_diffusion": ("stable_diffusion_1_5", _SD1),
    "stable_diffusion_v": ("stable_diffusion_2_1", _SD2),
    "stable_diffusion_inpainting": ("stable_diffusion_1_5_inpainting", _SD1),
    "stable_diffusion_xl": ("stable_diffusion_xl", _SDXL),
    "wuerstchen_prior": ("wuerstchen_prior", _WUERSTCHEN_PRIOR),
    "wuerstchen_decoder": ("wuerstchen_decoder", _WUERSTCHEN_DECODER),
    "kandinsky22_prior": ("kandinsky22_prior", _KANDINSKY_PRIOR),
    "kandinsky22_decoder": ("kandinsky22_decoder", _KANDINSKY_DECODER),
    "ddpm": ("ddpm_celebahq_256", _DDPM),
}


def tiny_architecture(name: str) -> Architecture:
    """The shrunk pipeline of that name, its vocabulary still CLIP's."""
    base, changes = _SHAPES[name]
    true = read_architecture(base)
    strange = changes.keys() - true.components.keys() - true.beside.keys()
    assert not strange, f"{name} changes {sorted(strange)}, which {base} does not have"
    components, beside = (_shrunk(group, changes) for group in (true.components, true.beside))
    return Architecture(f"tiny {name}", true.pipeline, f"random, in the shape of {true.source}", true.settings, {}, components, beside)


def _shrunk(components: Mapping[str, Component], changes: Changes) -> dict[str, Component]:
    return {part: entry.with_config(changes.get(part, {})) for part, entry in components.items()}
