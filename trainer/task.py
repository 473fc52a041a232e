"""What a recipe says is to be learnt: a network, its objective on a noise schedule, and what its samples mean."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import final

from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float64
from torch import Tensor, nn

from data_shards import ranks
from trainer.config import DenoisingConfig, ProgressiveDistillationConfig, RunConfig
from trainer.descriptor import Descriptor
from trainer.diffusion.schedule import alpha_bar_sha256, build_alpha_bar
from trainer.draws import Draws
from trainer.engines.frozen import place_frozen
from trainer.engines.precision import lower_type
from trainer.models.activation_checkpointing import enable_activation_checkpointing
from trainer.models.attention import Kernels, use_attention
from trainer.models.dropout import use_logical_dropout
from trainer.models.flops import forward_flops
from trainer.models.tiny_unet import Denoiser, build_tiny_unet, denoiser, shard_units
from trainer.objectives.denoising import denoising_loss, offset
from trainer.objectives.progressive_distillation import HalvingGrid, halving_loss
from trainer.rng import seed_weights
from trainer.source import load_source
from trainer.stages import grid as sampling_levels
from trainer.stages import halve

Objective = Callable[[Denoiser, Tensor, Draws], Tensor]
"""(denoiser, x_0, draws) -> loss per image."""

# A backward pass is two forwards' worth of operations; the halving target is two forwards of the teacher.
_TRAINED_FORWARDS, _TEACHER_FORWARDS = 3, 2


@final
@dataclass(frozen=True)
class Task:
    """A network to train and all that its objective needs."""

    module: nn.Module
    units: tuple[nn.Module, ...]
    """What a sharded engine gathers at a time."""
    objective: Objective
    alpha_bar: Float64[Tensor, " T"]
    descriptor: Descriptor
    stratified: bool
    attention: Kernels
    flops_per_image: int
    """Of one training step, teacher included; activations computed again do not count."""


def build_task(config: RunConfig, run_dir: Path, image_size: int) -> Task:
    """Join model, objective and noise schedule. Collective where a large teacher is shared among the ranks.

    Raises: ValueError where they do not fit each other or the teacher."""
    seed_weights(config.seed)
    alpha_bar = build_alpha_bar(config.noise_schedule).to(ranks.device())
    module = build_tiny_unet(config.model, image_size)
    use_logical_dropout(module)
    attention = _set_up(module, config)
    if config.train.activation_checkpointing:
        enable_activation_checkpointing(module)
    forwards = _TRAINED_FORWARDS
    match config.objective:
        case DenoisingConfig() as objective:
            timesteps, teacher_sha256, sampler = tuple(range(len(alpha_bar))), None, "ddim"
            loss = _denoising(objective, alpha_bar)
        case ProgressiveDistillationConfig() as objective:
            teacher = load_source(run_dir / objective.teacher)
            own = teacher.descriptor.timesteps
            levels = tuple(own[level] for level in sampling_levels(len(own), objective.teacher_steps))
            module.load_state_dict(teacher.model.state_dict())
            timesteps, teacher_sha256, sampler = halve(levels), teacher.weights_sha256, objective.sampler
            _set_up(teacher.model, config)
            frozen = place_frozen(teacher.model, shard_units(teacher.model), shard_above_gib=config.engine.shard_frozen_above_gib)
            loss = _halving(objective, denoiser(frozen), HalvingGrid.build(alpha_bar, levels, device=ranks.device()))
            forwards += _TEACHER_FORWARDS
    descriptor = Descriptor(
        prediction_type=config.objective.prediction,
        alpha_bar_sha256=alpha_bar_sha256(alpha_bar),
        timesteps=timesteps,
        clip=True,
        sampler=sampler,
        variance="fixed_small",
        step_count=len(timesteps),
        teacher_sha256=teacher_sha256,
        image_size=image_size,
        channels=3,
    )
    flops = forward_flops(lambda: build_tiny_unet(config.model, image_size), image_shape=(3, image_size, image_size))
    return Task(
        module=module,
        units=shard_units(module),
        objective=loss,
        alpha_bar=alpha_bar,
        descriptor=descriptor,
        stratified=config.objective.stratified,
        attention=attention,
        flops_per_image=forwards * flops,
    )


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
