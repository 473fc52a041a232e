"""Pixel models: teachers that denoise, and students that halve their steps."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import final

from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float64
from torch import Tensor

from data_shards import ranks
from data_shards.reading.sample import MicroBatch
from trainer.config import (
    DdpmConfig,
    DenoisingConfig,
    PixelModelConfig,
    Prediction,
    ProgressiveDistillationConfig,
    RunConfig,
    TinyUNetConfig,
    pixel_objective,
)
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.draws import Draws, draw
from trainer.engines.precision import lower_type
from trainer.metrics import Drawn
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.attention import Kernels, use_attention
from trainer.models.ddpm import build_unet, find_base, load_base
from trainer.models.dropout import use_logical_dropout
from trainer.models.encode import encode_pixels
from trainer.models.flops import forward_flops, training_forwards
from trainer.models.tiny_unet import Denoiser, build_tiny_unet, shard_units
from trainer.objectives.denoising import denoising_loss, offset
from trainer.pixel_base import PixelBase
from trainer.rng import seed_weights
from trainer.sample import draw_grid
from trainer.source import Source, base_descriptor, load_source, source_place
from trainer.start import load_start
from trainer.tasks.halving import StudentError, build_halving
from trainer.tasks.task import Task, Work
from trainer.training_data import TrainingData

Objective = Callable[[Denoiser, Tensor, Draws], Tensor]
"""(denoiser, x_0, draws) -> loss per image."""

GRID_SEED = 0
"""Of the sample grids' noise: the same in every run, so that a chain's stages can be compared face by face."""
_CHANNELS = 3
"""Of training images."""


@final
@dataclass(frozen=True)
class Levels:
    """On which noise levels a network draws."""

    descriptor: Descriptor
    alpha_bar: Float64[Tensor, " T"]


@final
@dataclass(frozen=True, eq=False)
class _Start:
    """A network before its first step. descriptor: of it, were it not trained any further; build: makes one like it."""

    module: UNet2DModel
    descriptor: Descriptor
    alpha_bar: Float64[Tensor, " T"]
    build: Callable[[], UNet2DModel]


def build_pixel_task(config: RunConfig, run_dir: Path, model: PixelModelConfig, image_size: int, data: TrainingData | None = None) -> Task:
    """Join model, objective and noise schedule. Collective where a large teacher is shared among the ranks.

    data: wanted where a student's error on its first samples ends the run.
    Raises: ValueError where they do not fit each other, the base or the teacher."""
    seed_weights(config.seed)
    halving, student_error = None, None
    match chosen := pixel_objective(config):
        case DenoisingConfig() as objective:
            start = _first(config, run_dir, model, objective, image_size)
            descriptor, alpha_bar = start.descriptor, start.alpha_bar.to(ranks.device())
            loss_at = partial(_same_at_every_step, _denoising(objective, alpha_bar, descriptor.prediction_type))
        case ProgressiveDistillationConfig() as objective:
            teacher = load_source(source_place(run_dir, objective.teacher))
            start = _copy(config, model, objective, teacher, image_size)
            alpha_bar = start.alpha_bar.to(ranks.device())
            halving = build_halving(config, objective, teacher, start.module, alpha_bar)
            descriptor = replace(
                start.descriptor,
                prediction_type=halving.turn.end,
                timesteps=halving.timesteps,
                sampler=objective.sampler,
                step_count=len(halving.timesteps),
                teacher_sha256=teacher.weights_sha256,
                start_sha256=None,
                heads=halving.heads,
            )
            loss_at = halving.loss_at
            if objective.stop_when is not None:
                assert data is not None, "a student is measured on samples"
                images = min(objective.stop_when.images, config.data.global_batch_size)
                student_error = StudentError(halving, data.examples(images).images)
    module = start.module
    use_logical_dropout(module)
    attention = _set_up(module, config)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(module)
    forwards = training_forwards(module) + (halving.teacher_forwards if halving else 0)
    forward = forward_flops(start.build, image_shape=(descriptor.channels, image_size, image_size))
    logs, levels_drawn = config.logging, Levels(descriptor, alpha_bar)
    return Task(
        module=module,
        units=shard_units(module),
        micro_batch=lambda batches, step, index: _micro_batch(config, loss_at(step), batches[0], step, index, stratified=chosen.stratified),
        draw=lambda predict, step: Drawn(
            draw_grid(
                halving.as_student(predict, step) if halving else predict,
                levels_drawn,
                images=logs.sample_images,
                steps=logs.sample_steps,
                seed=GRID_SEED,
            )
        ),
        descriptor=descriptor,
        attention=attention,
        flops_per_image=round(forwards * forward),
        student_error=student_error,
    )


def _first(config: RunConfig, run_dir: Path, model: PixelModelConfig, objective: DenoisingConfig, image_size: int) -> _Start:
    """The network that a recipe starts with: new, another run's or a base's. Raises: ValueError where either does not fit the recipe."""
    match model:
        case TinyUNetConfig():
            assert objective.prediction != "base", "the recipe's own check"
            alpha_bar, start_sha256 = build_alpha_bar(config.noise_schedule), None
            module = build_tiny_unet(model, image_size)
            if model.start is not None:
                start_sha256 = load_start(module, run_dir / model.start, prediction=objective.prediction, alpha_bar=alpha_bar)
            descriptor = Descriptor(
                prediction_type=objective.prediction,
                alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
                timesteps=tuple(range(len(alpha_bar))),
                clip=True,
                sampler="ddim",
                variance="fixed_small",
                step_count=len(alpha_bar),
                teacher_sha256=None,
                image_size=image_size,
                channels=_CHANNELS,
                start_sha256=start_sha256,
            )
            return _Start(module, descriptor, alpha_bar, lambda: build_tiny_unet(model, image_size))
        case DdpmConfig():
            base, files = find_base(model.base, revision=model.revision)
            base.prediction(objective.prediction)
            alpha_bar = base.alpha_bar(config.noise_schedule)
            if base.channels != _CHANNELS:
                raise ValueError(f"model.base={model.base}: draws images of {base.channels} channels; training images have {_CHANNELS}")
            module = load_base(base, files, image_size, dropout=model.dropout)
            descriptor = base_descriptor(base, image_size=image_size)
            return _Start(module, descriptor, alpha_bar, lambda: build_unet(base.unet, image_size, dropout=model.dropout))


def _copy(config: RunConfig, model: PixelModelConfig, objective: ProgressiveDistillationConfig, teacher: Source, image_size: int) -> _Start:
    """A student: its teacher's network, without its weights yet. Raises: ValueError where the recipe says otherwise."""
    descriptor = replace(teacher.descriptor, image_size=image_size)
    match model, base := descriptor.base:
        case TinyUNetConfig(), None:
            alpha_bar = build_alpha_bar(config.noise_schedule)

            def build() -> UNet2DModel:
                return build_tiny_unet(model, image_size)

        case DdpmConfig(), PixelBase():
            alpha_bar = base.alpha_bar(config.noise_schedule)

            def build() -> UNet2DModel:
                return build_unet(base.unet, image_size, dropout=model.dropout)

        case _:
            wanted = "tiny_unet" if base is None else "ddpm"
            raise ValueError(f"objective.teacher={objective.teacher}: is of model.kind={wanted}, not {model.kind}; set model.kind={wanted}")
    if alpha_bar_sha256(alpha_bar) != descriptor.alpha_bar_sha256:
        raise ValueError(
            f"noise_schedule: is not that of objective.teacher={objective.teacher}, whose recipe.yaml says which; take the teacher's"
        )
    return _Start(build(), descriptor, alpha_bar, build)


def _micro_batch(config: RunConfig, objective: Objective, batch: MicroBatch, step: int, index: int, *, stratified: bool) -> Work:
    count, channels, height, width = batch.images.shape
    draws = draw(
        config.seed,
        step,
        index,
        shape=(count, channels, height, width),
        micro_batches=config.micro_batches,
        stratified=stratified,
    )
    device = ranks.device()
    flips = draws.flips.to(device) if config.data.horizontal_flip else None
    x_0 = encode_pixels(batch.images.to(device, non_blocking=True), flips=flips, memory_format=config.train.layout)
    return Work(lambda model: objective(model, x_0, draws), draws.sha256())


def _set_up(model: UNet2DModel, config: RunConfig) -> Kernels:
    precision = lower_type(config.engine.precision)
    return use_attention(model, config.engine.attention, ranks.device(), **({} if precision is None else {"dtype": precision}))


def _denoising(objective: DenoisingConfig, alpha_bar: Tensor, prediction: Prediction) -> Objective:
    def loss(model: Denoiser, x_0: Tensor, draws: Draws) -> Tensor:
        noise = draws.noise.to(x_0.device)
        if objective.offset_noise:
            noise = offset(noise, draws.channel_noise.to(x_0.device), objective.offset_noise)
        return denoising_loss(
            model,
            x_0,
            noise=noise,
            uniforms=draws.uniforms,
            alpha_bar=alpha_bar,
            prediction=prediction,
            loss=objective.loss,
            min_snr_gamma=objective.min_snr_gamma,
        )

    return loss


def _same_at_every_step(loss: Objective, _: int) -> Objective:
    return loss
