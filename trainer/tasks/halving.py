"""Halving as a task: a teacher loaded and put in its place, the student its copy, and what the student is asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import final

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from data_shards import ranks
from trainer.config import Prediction, ProgressiveDistillationConfig, RunConfig
from trainer.diffusion.parameterization import Denoiser, from_x_0
from trainer.diffusion.schedule import alpha_sigma
from trainer.diffusion.turning import Turn, turning_progress
from trainer.draws import Draws
from trainer.engines.frozen import place_frozen
from trainer.engines.precision import autocast, lower_type
from trainer.models.attention import use_attention
from trainer.models.encode import encode_pixels
from trainer.models.network import Network, network
from trainer.models.tiny_unet import shard_units
from trainer.objectives.progressive_distillation import HalvingGrid, Lesson, halving_lesson
from trainer.plateau import stopped_falling
from trainer.rng import generator, stratified_uniforms
from trainer.source import Source
from trainer.stages import grid as sampling_levels


@final
@dataclass(frozen=True, eq=False)
class Halving:
    """A student's lessons, and what they make of it."""

    config: RunConfig
    objective: ProgressiveDistillationConfig
    teacher: Denoiser
    """In evaluation mode on this rank's device; a shared one's calls are collective."""
    source: Source
    grid: HalvingGrid
    alpha_bar: Float64[Tensor, " T"]

    @property
    def turn(self) -> Turn:
        """From the teacher's head to the student's."""
        return Turn(self.source.descriptor.prediction_type, student_prediction(self.objective, self.source))

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Original times of the student's levels, ascending."""
        return tuple(int(timestep) for timestep in self.grid.timestep.tolist())

    @property
    def heads(self) -> tuple[Prediction, ...]:
        """What the models before the student predicted and what it does, where that has changed; else empty."""
        before = self.source.descriptor.heads
        own = self.turn.end
        if before or self.turn.start != own:
            return (*(before or (self.turn.start,)), *((own,) if self.turn.start != own else ()))
        return ()

    @property
    def teacher_forwards(self) -> int:
        """Of one update."""
        return 1 + len(self.grid.later)

    def lesson(self, x_0: Float[Tensor, "b c h w"], *, noise: Tensor, uniforms: Tensor, step: int) -> Lesson:
        """What the student is asked at optimizer step `step`; noise and uniforms as `Draws` has them."""
        objective = self.objective
        return halving_lesson(
            self.teacher,
            x_0,
            noise=noise.to(x_0.device),
            uniforms=uniforms,
            grid=self.grid,
            prediction=self.turn.end,
            target=objective.target,
            loss=objective.loss,
            clip_target=objective.clip_target,
            min_snr_gamma=objective.min_snr_gamma,
            teacher_prediction=self.turn.start,
            progress=turning_progress(step, objective.turn_steps),
            feature_weight=objective.feature_weight,
        )

    def loss_at(self, step: int) -> Callable[[Denoiser, Tensor, Draws], Tensor]:
        """The loss per image of optimizer step `step`."""

        def loss(student: Denoiser, x_0: Tensor, draws: Draws) -> Tensor:
            return self.lesson(x_0, noise=draws.noise, uniforms=draws.uniforms, step=step).loss(student)

        return loss

    def as_student(self, predict: Network, step: int) -> Network:
        """A network whose head may still be turning, as one that predicts what the student is to: for drawing. Timesteps as floats."""
        progress = turning_progress(step, self.objective.turn_steps)
        return predict if progress >= 1 else partial(self._turned, predict, progress)

    def _turned(self, predict: Network, progress: float, x_t: Tensor, timestep: Tensor) -> Tensor:
        alpha_t, sigma_t = (scale.to(x_t).view(-1, 1, 1, 1) for scale in alpha_sigma(self.alpha_bar[timestep.long()]))
        x_0 = self.turn.to_x_0(predict(x_t, timestep), x_t, progress=progress, alpha_t=alpha_t, sigma_t=sigma_t)
        return from_x_0(x_0, x_t, alpha_t=alpha_t, sigma_t=sigma_t, kind=self.turn.end)


def build_halving(
    config: RunConfig, objective: ProgressiveDistillationConfig, source: Source, module: UNet2DModel, alpha_bar: Float64[Tensor, " T"]
) -> Halving:
    """Make `module` the teacher's copy and put the teacher in its place. Collective where it is shared among the ranks.

    source: the teacher. alpha_bar: of the recipe. Raises: ValueError where teacher and recipe do not fit each other."""
    own = source.descriptor.timesteps
    levels = tuple(own[level] for level in sampling_levels(len(own), objective.teacher_steps))
    _check_heads(objective, source)
    module.load_state_dict(source.model.state_dict())
    if Turn(source.descriptor.prediction_type, student_prediction(objective, source)).negates:
        with torch.no_grad():
            for parameter in module.conv_out.parameters():
                parameter.neg_()
    grid = HalvingGrid.build(alpha_bar, levels, student_steps=objective.student_steps, device=ranks.device())
    return Halving(config, objective, _placed(config, objective, source.model), source, grid, alpha_bar)


def _placed(config: RunConfig, objective: ProgressiveDistillationConfig, model: UNet2DModel) -> Denoiser:
    """A teacher ready to be asked, in its precision, memory format and compiled as the student is."""
    precision = objective.teacher_precision or config.engine.precision
    lower = lower_type(precision)
    use_attention(model, config.engine.attention, ranks.device(), **({} if lower is None else {"dtype": lower}))
    if config.train.layout == "channels_last":
        model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] (a keyword-only overload)
    frozen = place_frozen(model, shard_units(model), shard_above_gib=config.engine.shard_frozen_above_gib, lower=lower)
    if config.train.compiles:
        frozen.compile()
    predict = network(frozen)
    if objective.teacher_precision is None:
        return predict

    def in_its_precision(x_t: Tensor, timestep: Tensor) -> Tensor:
        with autocast(precision):
            return predict(x_t, timestep)

    return in_its_precision


def student_prediction(objective: ProgressiveDistillationConfig, source: Source) -> Prediction:
    """What the student predicts; `base` is as its teacher does."""
    return source.descriptor.prediction_type if objective.prediction == "base" else objective.prediction


def _check_heads(objective: ProgressiveDistillationConfig, source: Source) -> None:
    """Raise ValueError unless the student's head is its teacher's, or turns from it."""
    theirs, own = source.descriptor.prediction_type, student_prediction(objective, source)
    if theirs != own and objective.turn_steps is None:
        raise ValueError(
            f"objective.prediction={own}, but the teacher {source.path} predicts {theirs}; set objective.prediction={theirs}, or "
            "objective.turn_steps to the optimizer steps over which the head turns"
        )
    if theirs == own and objective.turn_steps is not None:
        raise ValueError(
            f"objective.turn_steps={objective.turn_steps}, but the teacher {source.path} predicts {theirs} as the student does; "
            "set objective.turn_steps=null"
        )


@final
class StudentError:
    """A student's error against its teacher on fixed images, noise and levels: how far a stage has come."""

    def __init__(self, halving: Halving, images: UInt8[Tensor, "b c h w"]) -> None:
        """images: the same on every rank."""
        stop_when = halving.objective.stop_when
        assert stop_when is not None, "asked only where the recipe wants it"
        self.every_steps, self._stop_when, self._halving, self._images = stop_when.every_steps, stop_when, halving, images

    @cached_property
    def _lessons(self) -> list[Lesson]:
        """Made once: the teacher is asked no more after the first measurement. Collective where the teacher is shared."""
        config, count = self._halving.config, len(self._images)
        noise = torch.randn(self._images.shape, generator=generator(config.seed, "student error", "noise"))
        uniforms = stratified_uniforms(generator(config.seed, "student error", "times"), count, stratum=0, strata=1)
        # In another order than the images', whose first ones may all be of one data set.
        uniforms = uniforms[torch.randperm(count, generator=generator(config.seed, "student error", "order"))]
        x_0 = encode_pixels(self._images, flips=None, memory_format=config.train.layout).to(ranks.device())
        size = config.data.micro_batch_size
        with autocast(config.engine.precision):
            return [
                self._halving.lesson(part, noise=part_noise, uniforms=part_times, step=0)
                for part, part_noise, part_times in zip(x_0.split(size), noise.split(size), uniforms.split(size), strict=True)
            ]

    def error(self, student: Network) -> float:
        """Mean loss of a network without gradient; rank 0's number on every rank. Collective."""
        losses = torch.cat([lesson.loss(student) for lesson in self._lessons])
        return float(ranks.all_gather_tensor(losses.double().mean().reshape(1))[0].item())

    def enough(self, errors: Sequence[float]) -> bool:
        """Whether the errors measured so far have stopped falling."""
        return stopped_falling(errors, least_gain=self._stop_when.least_gain, patience=self._stop_when.patience)
