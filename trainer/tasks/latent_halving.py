"""Halving in latents: a text-to-image teacher, with its guidance, in half its steps and without."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

from data_shards import ranks
from trainer.config import RunConfig
from trainer.config_latent import LatentHalvingConfig
from trainer.diffusion.parameterization import Denoiser
from trainer.engines.frozen import place_frozen
from trainer.engines.precision import lower_type
from trainer.latents.base import Levels
from trainer.latents.finished import Finished, load_finished
from trainer.latents.trained import Trained, latent_objective
from trainer.models.attention import use_attention
from trainer.models.network import Network, network
from trainer.objectives.progressive_distillation import HalvingGrid, halving_lesson
from trainer.stages import trailing

Cond = Mapping[str, Tensor]
_OF_THE_PICTURE = ("time_ids",)
"""Conditioning that says nothing of the text: XL's sizes."""


def guided(predict: Network, cond: Cond, empty: Cond, *, scale: float) -> Denoiser:
    """A network's prediction moved away from that for the empty text, both computed in one batch; scale 1 asks for one alone.

    cond: of a batch; empty: of one sample. Predictions of one kind at one x_t are linear in each other, so that guided v is the v of
    guided eps.
    Source: Ho & Salimans 2022, arXiv:2207.12598, equation 6, with scale = 1 + w; Meng et al. 2022, arXiv:2210.03142, section 3.1."""
    if scale == 1:
        return lambda x_t, timestep: predict(x_t, timestep, cond)
    pairs = {name: torch.cat([value, value if name in _OF_THE_PICTURE else empty[name].expand_as(value)]) for name, value in cond.items()}

    def predict_guided(x_t: Float[Tensor, "b c h w"], timestep: Float[Tensor, " b"]) -> Float[Tensor, "b c h w"]:
        with_text, without = predict(torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), pairs).chunk(2)
        return without + scale * (with_text - without)

    return predict_guided


@final
@dataclass(frozen=True, eq=False)
class LatentHalving:
    """A latent student's lessons."""

    settings: LatentHalvingConfig
    teacher: Network
    """In evaluation mode on this rank's device; a shared one's calls are collective."""
    teacher_sha256: str
    """Of its averaged weights."""
    grid: HalvingGrid
    levels: Levels
    min_snr_gamma: float

    @property
    def teacher_forwards(self) -> int:
        """Of one sample and update."""
        return (1 + len(self.grid.later)) * (1 if self.settings.guidance_scale == 1 else 2)

    @property
    def meaning(self) -> str:
        """What was done, for the descriptor."""
        settings = self.settings
        return (
            f"{settings.teacher_steps} to {settings.student_steps} trailing DDIM steps, guidance {settings.guidance_scale:g} folded in, "
            f"teacher {self.teacher_sha256}"
        )

    def loss(self, student: Denoiser, x_0: Tensor, *, noise: Tensor, uniforms: Tensor, cond: Cond, empty: Cond) -> Float[Tensor, " b"]:
        """Loss per sample; empty: the conditioning of one sample without text, asked only where there is guidance."""
        lesson = halving_lesson(
            guided(self.teacher, cond, empty, scale=self.settings.guidance_scale),
            x_0,
            noise=noise,
            uniforms=uniforms,
            grid=self.grid,
            prediction=self.levels.prediction,
            target="ddim",
            loss=self.settings.loss,
            min_snr_gamma=self.min_snr_gamma,
        )
        return lesson.loss(student)


def build_latent_halving(
    config: RunConfig, settings: LatentHalvingConfig, trained: Trained, levels: Levels, *, teacher: Finished, teacher_levels: Levels
) -> LatentHalving:
    """Make `trained` its teacher's copy and put the teacher in its place. Collective where it is shared among the ranks.

    Raises: ValueError where they do not fit each other."""
    _check_teacher(config, settings, teacher, levels, teacher_levels)
    trained.module.load_state_dict(teacher.trained.module.state_dict())
    lower = lower_type(config.engine.precision)
    use_attention(teacher.trained.network, config.engine.attention, ranks.device(), **({} if lower is None else {"dtype": lower}))
    frozen = place_frozen(
        teacher.trained.module, teacher.trained.denoiser.units(), shard_above_gib=config.engine.shard_frozen_above_gib, lower=lower
    )
    if config.train.compiles:
        frozen.compile()
    timesteps = trailing(len(levels.alpha_bar), settings.teacher_steps)
    grid = HalvingGrid.build(levels.alpha_bar, timesteps, student_steps=settings.student_steps, device=ranks.device())
    gamma = latent_objective(config).min_snr_gamma
    return LatentHalving(settings, network(frozen), teacher.weights_sha256, grid, levels, gamma)


def find_teacher(settings: LatentHalvingConfig, run_dir: Path) -> Finished:
    """The teacher's averaged weights. Raises: ValueError if it is no finished latent run."""
    return load_finished(run_dir / settings.teacher)


def _kind(config: RunConfig) -> dict[str, object]:
    """What two recipes' models share whose weights fit each other: all but how their inputs come."""
    return {"model": config.model.model_dump(exclude={"latents", "text", "frozen_precision"}), "adaptation": config.adaptation.model_dump()}


def _check_teacher(config: RunConfig, settings: LatentHalvingConfig, teacher: Finished, levels: Levels, theirs: Levels) -> None:
    own, its = _kind(config), _kind(teacher.recipe)
    for section in (section for section in own if own[section] != its[section]):
        raise ValueError(
            f"{section} is {own[section]}, but the teacher {teacher.path} was trained with {its[section]}; give the student the teacher's"
        )
    if levels.prediction != theirs.prediction or not torch.equal(levels.alpha_bar, theirs.alpha_bar):
        raise ValueError(
            f"the teacher {teacher.path} predicts {theirs.prediction} on its own noise levels, the student {levels.prediction} on others; "
            "give the student the teacher's noise_schedule, objective.prediction and objective.zero_terminal_snr"
        )
    before = latent_objective(teacher.recipe).halving
    if before is not None and (before.student_steps != settings.teacher_steps or settings.guidance_scale != 1):
        raise ValueError(
            f"the teacher {teacher.path} is a student of {before.student_steps} steps with guidance folded in; set "
            f"objective.halving.teacher_steps={before.student_steps} and objective.halving.guidance_scale=1"
        )
