"""A turning head: one prediction at its start, another at its end, and something definite at every angle between."""

from itertools import pairwise, permutations

import pytest
import torch
from torch import Tensor

from trainer.config_sections import LinearNoiseSchedule, Prediction
from trainer.diffusion.parameterization import from_x_0
from trainer.diffusion.schedule import alpha_sigma, build_alpha_bar
from trainer.diffusion.turning import Turn, turning_progress

KINDS: tuple[Prediction, ...] = ("v", "eps", "x_0")
PAIRS: list[tuple[Prediction, Prediction]] = list(permutations(KINDS, 2))
ALPHA_T, SIGMA_T = (scale.view(-1, 1, 1, 1) for scale in alpha_sigma(build_alpha_bar(LinearNoiseSchedule())[::37]))


def images(seed: int) -> Tensor:
    return torch.randn(len(ALPHA_T), 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_a_turn_starts_with_the_teachers_prediction_and_ends_with_the_students(start: Prediction, end: Prediction) -> None:
    x_0, eps, turn = images(0), images(1), Turn(start, end)
    x_t = ALPHA_T * x_0 + SIGMA_T * eps
    first, last = (turn.target(x_0, x_t, progress=progress, alpha_t=ALPHA_T, sigma_t=SIGMA_T) for progress in (0.0, 1.0))
    theirs, own = (from_x_0(x_0, x_t, alpha_t=ALPHA_T, sigma_t=SIGMA_T, kind=kind) for kind in (start, end))
    torch.testing.assert_close(first, -theirs if turn.negates else theirs)
    torch.testing.assert_close(last, own)


@pytest.mark.parametrize("progress", [0.0, 0.01, 0.3, 0.9, 1.0])
@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_the_clean_image_can_be_told_from_the_output_at_every_angle(start: Prediction, end: Prediction, progress: float) -> None:
    x_0, turn = images(0), Turn(start, end)
    x_t = ALPHA_T * x_0 + SIGMA_T * images(1)
    output = turn.target(x_0, x_t, progress=progress, alpha_t=ALPHA_T, sigma_t=SIGMA_T)
    torch.testing.assert_close(turn.to_x_0(output, x_t, progress=progress, alpha_t=ALPHA_T, sigma_t=SIGMA_T), x_0)


def test_from_eps_to_v_the_gain_at_the_noisiest_level_falls_from_157_to_1() -> None:
    alpha_t, sigma_t = (scale.view(1, 1, 1, 1) for scale in alpha_sigma(build_alpha_bar(LinearNoiseSchedule())[-1]))
    x_t, turn = torch.zeros(1, 1, 1, 1, dtype=torch.float64), Turn("eps", "v")
    gains = [
        -turn.to_x_0(torch.ones_like(x_t), x_t, progress=progress, alpha_t=alpha_t, sigma_t=sigma_t).item() for progress in (0.0, 0.1, 1.0)
    ]
    assert gains == pytest.approx([157.4, 6.2, 1.0], rel=0.01)


@pytest.mark.parametrize(("start", "end"), PAIRS)
def test_a_head_turns_without_a_jump(start: Prediction, end: Prediction) -> None:
    x_0, turn = images(0), Turn(start, end)
    x_t = ALPHA_T * x_0 + SIGMA_T * images(1)
    outputs = [turn.target(x_0, x_t, progress=k / 200, alpha_t=ALPHA_T, sigma_t=SIGMA_T) for k in range(201)]
    # No angle moves more than pi/2 in all, and (eps, x_0) is 6 long at most here.
    assert max((after - before).abs().max().item() for before, after in pairwise(outputs)) < torch.pi / 2 / 200 * 6


def test_progress_is_a_function_of_the_step() -> None:
    assert [turning_progress(step, 4) for step in (0, 1, 4, 9)] == [0.0, 0.25, 1.0, 1.0]
    assert turning_progress(0, None) == 1.0
