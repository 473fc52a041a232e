"""A recipe as the input of a plan: what `train` would build from it."""

from dataclasses import replace
from pathlib import Path

from torch import nn

from data_shards.index import ShardIndex
from trainer.config import (
    AutoencoderConfig,
    DdpmConfig,
    PixelModelConfig,
    ProgressiveDistillationConfig,
    RunConfig,
    TinyUNetConfig,
    stage_updates,
)
from trainer.latents.networks import shape_of
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.ddpm import build_unet
from trainer.models.tiny_unet import build_tiny_unet, shard_units
from trainer.plan.from_latent import latent_plan
from trainer.plan.plan_input import Frozen, PlanInput, Shapes
from trainer.plan.work import work_of

_CHANNELS = 3
_TEACHER_FORWARDS = 2
"""Of a halving's target."""


def plan_input(config: RunConfig, *, world_size: int, ranks_per_node: int, on_gpu: bool) -> PlanInput:
    """What a plan of this recipe on so many ranks is made of.

    Of a chain with a teacher from elsewhere, all of its students. Raises: ValueError where the recipe does not say how large the
    images are, and its shards are not there."""
    runs = [config.train.steps]
    if config.distill is not None and config.distill.teacher is not None:
        config, runs = config.model_copy(update={"data": config.stage_data}), list(stage_updates(config.distill))
    side = image_side(config)
    common = PlanInput(
        build=nn.Identity,
        units=lambda module: (),
        enable_checkpointing=lambda module: None,
        shapes=Shapes((_CHANNELS, side, side)),
        engine=config.engine,
        micro_batch_size=config.data.micro_batch_size,
        micro_batches=config.micro_batches,
        world_size=world_size,
        ranks_per_node=ranks_per_node,
        on_gpu=on_gpu,
        activation_checkpointing=config.train.activation_checkpointing,
        memory_format=config.train.layout,
        optim=config.optim,
        ema=config.ema,
        steps=sum(runs),
        keep_checkpoints=sum(kept_checkpoints(config, steps) for steps in runs),
    )
    match config.model:
        case TinyUNetConfig() | DdpmConfig() as model:
            return _pixel(config, model, common, side=side)
        case AutoencoderConfig():
            raise ValueError("model.kind=autoencoder: plan knows what denoises; an autoencoder of this kind is small enough to be tried")
        case _:
            return latent_plan(config, common, side=side)


def _pixel(config: RunConfig, model: PixelModelConfig, common: PlanInput, *, side: int) -> PlanInput:
    match model:
        case TinyUNetConfig():

            def build() -> nn.Module:
                return build_tiny_unet(model, side)

        case DdpmConfig():
            shape = shape_of(model.base, "unet").config

            def build() -> nn.Module:
                return build_unet(shape, side, dropout=model.dropout)

    plan = replace(
        common,
        build=build,
        units=shard_units,  # type: ignore[arg-type]  # of the network that build makes
        enable_checkpointing=enable_activation_checkpointing,  # type: ignore[arg-type]
    )
    taught = config.distill is not None and config.distill.teacher is not None  # the chain trains students alone
    if not taught and not isinstance(config.objective, ProgressiveDistillationConfig):
        return plan
    teacher = work_of(plan)
    beside = Frozen("teacher", teacher.trained, flops_per_image=_TEACHER_FORWARDS * teacher.forward_flops)
    return replace(plan, frozen=(beside,))


def image_side(config: RunConfig) -> int:
    """Pixels a side of the images that a run trains on."""
    data = config.data
    if data.image_size is not None:
        return data.image_size
    if data.faces is not None:
        return data.faces.size
    missing = [name for name in data.places if not Path(name).is_dir()]
    if missing:
        raise ValueError(
            f"data.shards={missing[0]}: not there, so its images' size is not known; set data.image_size to their pixels a side"
        )
    return max(ShardIndex.load(Path(name)).side() for name in data.places)


def kept_checkpoints(config: RunConfig, steps: int) -> int:
    """Checkpoints that lie on the disk at the end of a run of so many steps."""
    checkpoint = config.checkpoint
    for_good = steps // checkpoint.keep_every_steps if checkpoint.keep_every_steps else 0
    written = -(-steps // checkpoint.every_steps)
    return min(written, checkpoint.keep_last + checkpoint.keep_best + for_good)
