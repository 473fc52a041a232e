"""The kinds of tiny models that can be made; read without torch."""

from collections.abc import Mapping

KINDS: Mapping[str, str] = {
    "stable_diffusion": "Stable Diffusion 1.5: 4 latent channels, predicts eps",
    "stable_diffusion_inpainting": "Stable Diffusion 1.5 for inpainting: 9 channels in",
}
"""What each kind is, by its name."""


def check_kind(kind: str) -> str:
    """The same name.

    Raises: ValueError naming the kinds if there is none of that name."""
    if kind not in KINDS:
        raise ValueError(f"{kind} is no kind of tiny model; give one of {', '.join(KINDS)}")
    return kind
