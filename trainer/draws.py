"""What is random about a micro-batch: noise, times and flips, as a pure function of (seed, step, index)."""

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.rng import generator, stratified_uniforms


@dataclass(frozen=True)
class Draws:
    """The random numbers of micro-batch (step, index), on the CPU."""

    noise: Float[Tensor, "b c *sides"]
    """Standard normal, before any offset."""
    channel_noise: Float[Tensor, "b c *ones"]
    """Standard normal, one number a channel: the direction of offset noise."""
    uniforms: Float[Tensor, " b"]
    """In [0, 1): where on the time axis each image lies."""
    flips: Bool[Tensor, " b"]
    """Which images are mirrored, where the recipe asks for it."""

    def sha256(self) -> str:
        """Digest of noise and times, for the ledger."""
        digest = hashlib.sha256(self.noise.numpy().data)
        digest.update(self.uniforms.numpy().data)
        return digest.hexdigest()


def draw(seed: int, step: int, index: int, *, shape: tuple[int, ...], micro_batches: int, stratified: bool) -> Draws:
    """The draws of one micro-batch of images or latents of `shape` (b, c, h, w), or of embeddings (b, d).

    stratified: times cover the global batch evenly; which strata this micro-batch takes moves on by one each step."""
    times = generator(seed, "times", step, index)
    count, channels = shape[:2]
    if stratified:
        uniforms = stratified_uniforms(times, count, stratum=(index + step) % micro_batches, strata=micro_batches)
    else:
        uniforms = torch.rand(count, generator=times, dtype=torch.float64)
    noise = generator(seed, "noise", step, index)
    return Draws(
        noise=torch.randn(shape, generator=noise),
        channel_noise=torch.randn((count, channels, *[1] * (len(shape) - 2)), generator=noise),
        uniforms=uniforms,
        flips=torch.rand(count, generator=generator(seed, "flips", step, index)) < 0.5,
    )


@dataclass(frozen=True)
class LatentDraws:
    """What a latent model's micro-batch needs beside `Draws`, on the CPU; None where the recipe does without."""

    posterior: Float[Tensor, "b c h w"] | None
    """Standard normal: which latent of the many that an autoencoder's moments allow."""
    perturbation: Float[Tensor, "b c *sides"] | None
    """Standard normal, added to the network's input alone."""
    caption_dropped: Bool[Tensor, " b"]
    """Which captions are left out."""


def draw_latent(
    seed: int, step: int, index: int, *, shape: tuple[int, ...], posterior: bool, perturbed: bool, caption_dropout: float
) -> LatentDraws:
    """The latent draws of one micro-batch of latents of `shape`. caption_dropout: probability in [0, 1)."""
    captions = torch.rand(shape[0], generator=generator(seed, "captions", step, index))
    return LatentDraws(
        posterior=torch.randn(shape, generator=generator(seed, "posterior", step, index)) if posterior else None,
        perturbation=torch.randn(shape, generator=generator(seed, "perturbation", step, index)) if perturbed else None,
        caption_dropped=captions < caption_dropout,
    )
