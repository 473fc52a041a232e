"""Of what size a model's pictures are drawn."""

from trainer.config import RunConfig, WuerstchenPriorConfig

WUERSTCHEN_MULTIPLE = 128
"""Pixels: its decoder halves latents often enough to want no other sizes."""
_PRIOR_CELL, _ENCODER_CELL = 42.67, 32
"""Pixels that a latent's element counts in its pipelines, and in the images that it was trained on."""


def picture_side(config: RunConfig, image_size: int | None) -> int | None:
    """Side in pixels of the pictures of a model that learnt from images of this size: latents of about the size that it has seen."""
    if image_size is None or not isinstance(config.model, WuerstchenPriorConfig):
        return image_size
    return max(1, round(image_size / _ENCODER_CELL * _PRIOR_CELL / WUERSTCHEN_MULTIPLE)) * WUERSTCHEN_MULTIPLE
