"""A head on its way from one prediction to another: a student that starts as its teacher's function and ends with a stock head.

Every prediction is a direction in the plane of noise and clean image, eps cos(phi) - x_0 sin(phi): eps has phi = 0, v has
phi = theta = arctan(sigma_t / alpha_t), -x_0 has phi = pi/2. Turning phi from the teacher's direction to the student's keeps one
network, whose output always means something definite at x_t, so that it can be trained and sampled at every angle: at the first
one its weights are the teacher's, at the last one those of a model with the new head. With x_0 = (cos(phi) x_t - sigma_t F) /
cos(theta - phi) an error of the output F reaches the clean image multiplied by sigma_t / cos(theta - phi). For eps at the noisy
end of linear betas that is 157; a tenth of the way to v it is 6, and 1 at the end. theta - phi never leaves (-pi/2, pi/2), so
that x_0 is determined wherever alpha_t > 0."""

import math
from dataclasses import dataclass
from typing import assert_never, final

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.config_sections import Prediction


@final
@dataclass(frozen=True)
class Turn:
    """From the head `start` to the head `end`.

    The direction of a clean image is -x_0: where just one of the two heads is x_0, the student's last layer starts with the
    teacher's weights negated, which changes no bit of what it computes, and its output is -F from there on or until there."""

    start: Prediction
    end: Prediction

    @property
    def negates(self) -> bool:
        """Whether the student's output starts as the teacher's negated."""
        return (self.start == "x_0") != (self.end == "x_0")

    def direction(
        self, progress: float, *, alpha_t: Float[Tensor, "b 1 1 1"], sigma_t: Float[Tensor, "b 1 1 1"]
    ) -> tuple[Float[Tensor, "b 1 1 1"], Float[Tensor, "b 1 1 1"]]:
        """Factors (of eps, of x_0) whose sum is the student's output, `progress` of the way in [0, 1]; exact at both ends."""
        sign = -1.0 if self.end == "x_0" else 1.0
        start, end = (_angle(kind, alpha_t=alpha_t, sigma_t=sigma_t) for kind in (self.start, self.end))
        if progress <= 0 or progress >= 1:
            of_eps, of_x_0 = _ends(self.start if progress <= 0 else self.end, alpha_t=alpha_t, sigma_t=sigma_t)
        else:
            phi = torch.lerp(start, end, progress)
            of_eps, of_x_0 = phi.cos().to(alpha_t), -phi.sin().to(alpha_t)
        return sign * of_eps, sign * of_x_0

    def target(
        self,
        x_0: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        *,
        progress: float,
        alpha_t: Float[Tensor, "b 1 1 1"],
        sigma_t: Float[Tensor, "b 1 1 1"],
    ) -> Float[Tensor, "b c h w"]:
        """The output that implies the clean image x_0 at x_t; sigma_t above 0."""
        of_eps, of_x_0 = self.direction(progress, alpha_t=alpha_t, sigma_t=sigma_t)
        return of_eps * ((x_t - alpha_t * x_0) / sigma_t) + of_x_0 * x_0

    def to_x_0(
        self,
        output: Float[Tensor, "b c h w"],
        x_t: Float[Tensor, "b c h w"],
        *,
        progress: float,
        alpha_t: Float[Tensor, "b 1 1 1"],
        sigma_t: Float[Tensor, "b 1 1 1"],
    ) -> Float[Tensor, "b c h w"]:
        """The clean image that an output implies, unclipped; alpha_t above 0."""
        of_eps, of_x_0 = self.direction(progress, alpha_t=alpha_t, sigma_t=sigma_t)
        return (of_eps * x_t - sigma_t * output) / (alpha_t * of_eps - sigma_t * of_x_0)


def turning_progress(step: int, turn_steps: int | None) -> float:
    """How far a head has turned at optimizer step `step`: from 0 at step 0 in a straight line to 1 at step `turn_steps` (None: 1)."""
    return 1.0 if turn_steps is None else min(1.0, step / turn_steps)


def _angle(kind: Prediction, *, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The direction of a prediction, in fp64."""
    match kind:
        case "eps":
            return torch.zeros_like(alpha_t, dtype=torch.float64)
        case "v":
            return torch.atan2(sigma_t.double(), alpha_t.double())
        case "x_0":
            return torch.full_like(alpha_t, math.pi / 2, dtype=torch.float64)
        case _:
            assert_never(kind)


def _ends(kind: Prediction, *, alpha_t: Tensor, sigma_t: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and negated sine of a prediction's direction, without rounding."""
    match kind:
        case "eps":
            return torch.ones_like(alpha_t), torch.zeros_like(alpha_t)
        case "v":
            return alpha_t, -sigma_t
        case "x_0":
            return torch.zeros_like(alpha_t), -torch.ones_like(alpha_t)
        case _:
            assert_never(kind)
