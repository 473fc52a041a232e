"""The kinds of tiny models that can be made; read without torch."""

import difflib
from collections.abc import Mapping

KINDS: Mapping[str, str] = {
    "stable_diffusion": "Stable Diffusion 1.5: 4 latent channels, predicts eps",
    "stable_diffusion_v": "Stable Diffusion 2.1: 4 latent channels, predicts v",
    "stable_diffusion_inpainting": "Stable Diffusion 1.5 for inpainting: 9 channels in",
    "stable_diffusion_xl": "Stable Diffusion XL: two text encoders",
    "wuerstchen_prior": "Wuerstchen's prior; beside it decoder/, and image_encoder/ of true size (EfficientNetV2-S has no other)",
    "kandinsky22_prior": "Kandinsky 2.2's prior: text to image embeddings",
    "kandinsky22_decoder": "Kandinsky 2.2's decoder: image embeddings to images; beside it image_encoder/",
    "ddpm": "google's DDPM of faces: a UNet2DModel of pixels, 32 of them a side, predicts eps",
    "autoencoder": "AutoencoderKL alone, 8 times down to 4 channels",
    "clip": "CLIP, text and image encoder, for scores",
    "blip": "BLIP, a captioner",
}
"""What each kind is, by its name."""


def check_kind(kind: str) -> str:
    """The same name.

    Raises: ValueError naming the kinds if there is none of that name."""
    if kind not in KINDS:
        near = difflib.get_close_matches(kind, KINDS, n=1)
        raise ValueError(f"{kind} is no kind of tiny model{f'; did you mean {near[0]}?' if near else ''}; give one of {', '.join(KINDS)}")
    return kind
