"""Pixel models: teachers that denoise, and students that halve their steps."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float64
from torch import Tensor

from data_shards import ranks
from data_shards.reading.sample import MicroBatch
from trainer.config import DenoisingConfig, ProgressiveDistillationConfig, RunConfig, TinyUNetConfig, pixel_objective
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.draws import Draws, draw
from trainer.engines.frozen import place_frozen
from trainer.engines.precision import lower_type
from trainer.metrics import Drawn
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.attention import Kernels, use_attention
from trainer.models.dropout import use_logical_dropout
from trainer.models.encode import encode_pixels
from trainer.models.flops import forward_flops
from trainer.models.network import network
from trainer.models.tiny_unet import Denoiser, build_tiny_unet, shard_units
from trainer.objectives.denoising import denoising_loss, offset
from trainer.objectives.progressive_distillation import HalvingGrid, halving_loss
from trainer.rng import seed_weights
from trainer.sample import draw_grid
from trainer.source import load_source
from trainer.stages import grid as sampling_levels
from trainer.stages import halve
from trainer.start import load_start
from trainer.tasks.task import Task, Work

Objective = Callable[[Denoiser, Tensor, Draws], Tensor]
"""(denoiser, x_0, draws) -> loss per image."""

GRID_SEED = 0
"""Of the sample grids' noise: the same in every run, so that a chain's stages can be compared face by face."""
# A backward pass is two forwards' worth of operations; the halving target is two forwards of the teacher.
_TRAINED_FORWARDS, _TEACHER_FORWARDS = 3, 2


@final
@dataclass(frozen=True)
class Levels:
    """On which noise levels a network draws."""

    descriptor: Descriptor
    alpha_bar: Float64[Tensor, " T"]


def build_pixel_task(config: RunConfig, run_dir: Path, model: TinyUNetConfig, image_size: int) -> Task:
    """Join model, objective and noise schedule. Collective where a large teacher is shared among the ranks.

    Raises: ValueError where they do not fit each other or the teacher."""
    seed_weights(config.seed)
    alpha_bar = build_alpha_bar(config.noise_schedule).to(ranks.device())
    module = build_tiny_unet(model, image_size)
    use_logical_dropout(module)
    attention = _set_up(module, config)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(module)
    forwards, start_sha256 = _TRAINED_FORWARDS, None
    match chosen := pixel_objective(config):
        case DenoisingConfig() as objective:
            timesteps, teacher_sha256, sampler = tuple(range(len(alpha_bar))), None, "ddim"
            if model.start is not None:
                start_sha256 = load_start(module, run_dir / model.start, prediction=objective.prediction, alpha_bar=alpha_bar.cpu())
            loss = _denoising(objective, alpha_bar)
        case ProgressiveDistillationConfig() as objective:
            teacher = load_source(run_dir / objective.teacher)
            own = teacher.descriptor.timesteps
            levels = tuple(own[level] for level in sampling_levels(len(own), objective.teacher_steps))
            module.load_state_dict(teacher.model.state_dict())
            timesteps, teacher_sha256, sampler = halve(levels), teacher.weights_sha256, objective.sampler
            _set_up(teacher.model, config)
            frozen = place_frozen(teacher.model, shard_units(teacher.model), shard_above_gib=config.engine.shard_frozen_above_gib)
            loss = _halving(objective, network(frozen), HalvingGrid.build(alpha_bar, levels, device=ranks.device()))
            forwards += _TEACHER_FORWARDS
    descriptor = Descriptor(
        prediction_type=chosen.prediction,
        alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
        timesteps=timesteps,
        clip=True,
        sampler=sampler,
        variance="fixed_small",
        step_count=len(timesteps),
        teacher_sha256=teacher_sha256,
        image_size=image_size,
        channels=3,
        start_sha256=start_sha256,
    )
    flops = forward_flops(lambda: build_tiny_unet(model, image_size), image_shape=(3, image_size, image_size))
    logs, levels_drawn = config.logging, Levels(descriptor, alpha_bar)
    return Task(
        module=module,
        units=shard_units(module),
        micro_batch=lambda batches, step, index: _micro_batch(config, loss, batches[0], step, index, stratified=chosen.stratified),
        draw=lambda predict, step: Drawn(
            draw_grid(predict, levels_drawn, images=logs.sample_images, steps=logs.sample_steps, seed=GRID_SEED)
        ),
        descriptor=descriptor,
        attention=attention,
        flops_per_image=forwards * flops,
    )


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
    x_0 = encode_pixels(batch.images.to(device, non_blocking=True), flips=flips, memory_format=config.train.memory_format)
    return Work(lambda model: objective(model, x_0, draws), draws.sha256())


def _set_up(model: UNet2DModel, config: RunConfig) -> Kernels:
    precision = lower_type(config.engine.precision)
    return use_attention(model, config.engine.attention, ranks.device(), **({} if precision is None else {"dtype": precision}))


def _denoising(objective: DenoisingConfig, alpha_bar: Tensor) -> Objective:
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
            prediction=objective.prediction,
            loss=objective.loss,
            min_snr_gamma=objective.min_snr_gamma,
        )

    return loss


def _halving(objective: ProgressiveDistillationConfig, teacher: Denoiser, grid: HalvingGrid) -> Objective:
    def loss(model: Denoiser, x_0: Tensor, draws: Draws) -> Tensor:
        return halving_loss(
            model,
            teacher,
            x_0,
            noise=draws.noise.to(x_0.device),
            uniforms=draws.uniforms,
            grid=grid,
            prediction=objective.prediction,
            target=objective.target,
            loss=objective.loss,
            clip_target=objective.clip_target,
            min_snr_gamma=objective.min_snr_gamma,
        )

    return loss
