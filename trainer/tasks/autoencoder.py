"""A small autoencoder, trained from scratch: images to latents and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import UInt8
from torch import Tensor

from data_shards import ranks
from data_shards.reading.sample import MicroBatch
from trainer.config import AutoencoderConfig, RunConfig
from trainer.config_latent import AutoencodingConfig
from trainer.draws import draw
from trainer.metrics import Drawn
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.attention import use_attention
from trainer.models.autoencoder import TrainedAutoencoder, build_autoencoder
from trainer.models.encode import encode_pixels
from trainer.models.flops import flops_of, training_forwards
from trainer.models.network import Network
from trainer.objectives.autoencoding import autoencoding_loss, edges_at_scales
from trainer.prompting.sheet import SheetGroup, draw_sheet
from trainer.rng import seed_weights
from trainer.sample import to_uint8
from trainer.tasks.task import Task, Work
from trainer.training_data import TrainingData

_COLUMNS = 8
"""Images a row of the sheet."""


@final
@dataclass(frozen=True)
class AutoencoderMeaning:
    """What the weights of an autoencoder's run mean."""

    kind: str
    latent_channels: int
    image_size: int

    def to_json(self) -> dict[str, object]:
        """As a manifest holds it."""
        return dict(vars(self))


def new_autoencoder(config: RunConfig, model: AutoencoderConfig, image_size: int) -> TrainedAutoencoder:
    """The autoencoder of a recipe with its first weights, the same on every rank.

    Raises: ValueError if images of this size cannot be halved as often as it has levels."""
    seed_weights(config.seed)
    return TrainedAutoencoder(
        build_autoencoder(
            channels=model.channels,
            layers_per_block=model.layers_per_block,
            latent_channels=model.latent_channels,
            norm_groups=model.norm_groups,
            image_size=image_size,
        )
    )


def build_autoencoder_task(config: RunConfig, model: AutoencoderConfig, data: TrainingData) -> Task:
    """Join the autoencoder with its objective. Raises: ValueError where the data does not fit."""
    module, size = new_autoencoder(config, model, data.image_size), data.image_size
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(module.vae)
    assert isinstance(config.objective, AutoencodingConfig), "the recipe's own check"
    objective, shape = config.objective, module.latent_shape(size)

    def micro_batch(batches: Sequence[MicroBatch], step: int, index: int) -> Work:
        [batch] = batches
        draws = draw(config.seed, step, index, shape=(len(batch.keys), *shape), micro_batches=config.micro_batches, stratified=False)
        flips = draws.flips.to(ranks.device()) if config.data.horizontal_flip else None
        pixels = batch.images.to(ranks.device(), non_blocking=True)
        images, noise = encode_pixels(pixels, flips=flips, memory_format=config.train.layout), draws.noise.to(ranks.device())

        def loss(network: Network) -> Tensor:
            return autoencoding_loss(
                lambda x, posterior: network(x, posterior),  # type: ignore[arg-type,return-value]  # the network of a pair
                images,
                noise=noise,
                features=edges_at_scales,
                kl_weight=objective.kl_weight,
                feature_weight=objective.feature_weight,
            )

        return Work(loss, draws.sha256())

    forward = flops_of(module, lambda: (torch.zeros(1, 3, size, size), torch.zeros(1, *shape)))
    return Task(
        module=module,
        units=module.units(),
        micro_batch=micro_batch,
        draw=lambda network, step: _reconstructions(network, data, shape, images=config.logging.sample_images, step=step),
        descriptor=AutoencoderMeaning("autoencoder", model.latent_channels, size),
        attention=use_attention(module.vae, config.engine.attention, ranks.device()),
        flops_per_image=round(training_forwards(module) * forward),
    )


def _reconstructions(network: Network, data: TrainingData, shape: tuple[int, int, int], *, images: int, step: int) -> Drawn:
    """Some training images above what comes back of them, from the mean of their latents. Collective."""
    given = data.examples(images).images
    x = encode_pixels(given.to(ranks.device()), flips=None)
    back, _ = network(x, torch.zeros(len(x), *shape, device=x.device))
    rows = {"images": given.permute(0, 2, 3, 1), f"step {step}": to_uint8(back.cpu())}
    count = min(_COLUMNS, len(given))
    groups = [SheetGroup(title, pictures[: len(pictures) // count * count].unflatten(0, (-1, count))) for title, pictures in rows.items()]
    return Drawn(draw_sheet([""] * len(groups[0].images), groups), {"psnr": _psnr(rows["images"], rows[f"step {step}"])})


def _psnr(images: UInt8[Tensor, "b h w c"], others: UInt8[Tensor, "b h w c"]) -> float:
    """Peak signal-to-noise ratio in dB, of all images together."""
    error = (images.float() - others.float()).square().mean().item()
    return 10 * math.log10(255**2 / max(error, 1e-3))
